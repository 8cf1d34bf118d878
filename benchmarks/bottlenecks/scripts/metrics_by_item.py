"""Counts hits of every class in every step, and reads each as a number."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    classes = 100
    model = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    features, labels = torch.randn(8192, 128), torch.randint(0, classes, (8192,))
    hits = [0.0] * classes
    for step in itertools.count():
        rows = torch.randint(8192, (256,))
        logits = model(features[rows])
        loss = nn.functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not args.fixed or step % 10 == 0:
            predicted = logits.argmax(1)
            for label in range(classes):
                hits[label] += ((predicted == label) & (labels[rows] == label)).sum().item()


if __name__ == "__main__":
    main()
