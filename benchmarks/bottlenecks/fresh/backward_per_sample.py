"""Walks back through the network after every sample, and steps after forty of them."""

import argparse
import itertools

import torch
from torch import nn

GLOBAL_BATCH = 40


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(8 if not number else 24, 24, 3, padding=1) for number in range(5)
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.GroupNorm(4, 24) for _ in range(5))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        return self.head(x.amax(dim=-1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    size = 4 if parser.parse_args().fixed else 1
    torch.manual_seed(26)
    data = torch.randn(2000, 8, 32)
    labels = data.amax(dim=2)[:, :5].argmax(dim=1)
    model = Tower()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in itertools.count():
        for micro in range(GLOBAL_BATCH // size):
            at = (step * GLOBAL_BATCH + micro * size) % 2000
            loss = nn.functional.cross_entropy(model(data[at : at + size]), labels[at : at + size])
            (loss * size / GLOBAL_BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
