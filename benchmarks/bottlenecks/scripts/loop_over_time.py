"""A recurrent network whose time steps are a loop in Python."""

import argparse
import itertools

import torch
from torch import nn


class Recurrent(nn.Module):
    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once
        self.read = nn.Linear(16, 32)
        self.decay = nn.Parameter(torch.rand(32))
        self.head = nn.Linear(32, 1)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        if self.at_once:
            values = self.read(signal)
            weights = torch.sigmoid(self.decay) ** torch.arange(signal.shape[1] - 1, -1, -1).unsqueeze(1)
            return self.head(torch.einsum("bth,th->bh", values, weights))
        state = torch.zeros(signal.shape[0], 32)
        for t in range(signal.shape[1]):
            state = state * torch.sigmoid(self.decay) + self.read(signal[:, t])
        return self.head(state)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Recurrent(args.fixed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    signals, targets = torch.randn(4096, 64, 16), torch.randn(4096, 1)
    for _ in itertools.count():
        rows = torch.randint(4096, (32,))
        loss = nn.functional.mse_loss(model(signals[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
