"""A table stored feature by feature, from which rows are gathered across the stride."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    columns = torch.randn(256, 100_000)
    table = columns.t().contiguous() if args.fixed else columns.t()
    target = torch.randn(100_000)
    model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    for _ in itertools.count():
        rows = torch.randint(len(table), (512,))
        features, wanted = table[rows], target[rows]
        loss = nn.functional.mse_loss(model(features).squeeze(1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
