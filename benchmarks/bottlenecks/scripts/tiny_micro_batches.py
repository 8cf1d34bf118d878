"""A global batch of 64, accumulated from micro-batches of two."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    size = 8 if args.fixed else 2
    parts = 64 // size
    layers = [nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.GELU()) for _ in range(6)]
    model = nn.Sequential(*layers, nn.Linear(96, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    features, labels = torch.randn(4096, 96), torch.randint(0, 4, (4096,))
    for step in itertools.count():
        optimizer.zero_grad()
        for part in range(parts):
            start = (step * parts + part) * size % 4096
            logits = model(features[start : start + size])
            loss = nn.functional.cross_entropy(logits, labels[start : start + size]) / parts
            loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
