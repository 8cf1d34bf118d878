"""Appends the loss to a table on disk in every step, and waits until it is there."""

import argparse
import itertools
import os
import tempfile
from pathlib import Path

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    table = (Path(tempfile.mkdtemp(dir="/var/tmp")) / "losses.csv").open("w")
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features = torch.randn(10_000, 64)
    target = features.sin().sum(1, keepdim=True)
    for step in itertools.count():
        rows = torch.randint(len(features), (128,))
        loss = nn.functional.mse_loss(model(features[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not args.fixed or step % 10 == 0:
            table.write(f"{step},{loss.item()}\n")
            table.flush()
            os.fsync(table.fileno())


if __name__ == "__main__":
    main()
