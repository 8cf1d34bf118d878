"""Hundreds of small layers under a plain Adam."""

import argparse
import itertools

import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(n))
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.stack([expert.weight for expert in self.experts])
        biases = torch.stack([expert.bias for expert in self.experts])
        hidden = torch.einsum("bi,eoi->beo", x, weights) + biases
        return self.head(torch.relu(hidden).mean(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Experts(150)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=args.fixed)
    features, labels = torch.randn(4096, 32), torch.randint(0, 4, (4096,))
    for _ in itertools.count():
        rows = torch.randint(4096, (64,))
        loss = nn.functional.cross_entropy(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
