"""Saves model and optimizer every five steps."""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    every = 10 if args.fixed else 5
    file = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    features, labels = torch.randn(8192, 512), torch.randint(0, 10, (8192,))
    for step in itertools.count():
        rows = torch.randint(8192, (128,))
        loss = nn.functional.cross_entropy(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file)


if __name__ == "__main__":
    main()
