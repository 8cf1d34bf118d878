"""Clips the gradients of hundreds of tensors one by one, reading every norm."""

import argparse
import itertools

import torch
from torch import nn


class Adapters(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(64) / 8) for _ in range(n))
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x @ torch.stack(list(self.scales)).t() @ torch.stack(list(self.scales)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Adapters(800)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(4096, 64), torch.randint(0, 4, (4096,))
    for _ in itertools.count():
        rows = torch.randint(4096, (32,))
        loss = nn.functional.cross_entropy(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        if not args.fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()


if __name__ == "__main__":
    main()
