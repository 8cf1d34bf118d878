"""Evaluates on the whole test set every ten steps."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    every = 20 if args.fixed else 10
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(20_000, 256), torch.randint(0, 10, (20_000,))
    for step in itertools.count():
        rows = torch.randint(10_000, (256,))
        loss = nn.functional.cross_entropy(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == every - 1:
            model.eval()
            with torch.no_grad():
                hits = sum(
                    int((model(features[start : start + 500]).argmax(1) == labels[start : start + 500]).sum())
                    for start in range(10_000, 20_000, 500)
                )
            model.train()
            print(step, hits / 10_000)


if __name__ == "__main__":
    main()
