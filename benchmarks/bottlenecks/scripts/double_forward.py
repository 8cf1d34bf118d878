"""Runs the network a second time in every step, for the accuracy."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(4096, 512), torch.randint(0, 10, (4096,))
    hits = torch.zeros((), dtype=torch.long)
    for _ in itertools.count():
        rows = torch.randint(4096, (256,))
        logits = model(features[rows])
        loss = nn.functional.cross_entropy(logits, labels[rows])
        predicted = logits if args.fixed else model(features[rows])
        hits += (predicted.argmax(1) == labels[rows]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
