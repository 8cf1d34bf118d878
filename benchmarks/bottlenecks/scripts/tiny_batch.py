"""A small network trained on two samples at a time."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    size = 4 if args.fixed else 2
    layers = [nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), nn.ReLU()) for _ in range(16)]
    model = nn.Sequential(*layers, nn.Linear(48, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(4096, 48), torch.randint(0, 4, (4096,))
    for step in itertools.count():
        start = step * size % 4096
        loss = nn.functional.cross_entropy(model(features[start : start + size]), labels[start : start + size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
