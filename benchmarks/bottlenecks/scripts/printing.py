"""Prints an example of its predictions in every step."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    signals = torch.randn(10_000, 64)
    for step in itertools.count():
        batch = signals[torch.randint(len(signals), (256,))]
        rebuilt = model(batch)
        loss = nn.functional.mse_loss(rebuilt, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not args.fixed or step % 10 == 0:
            print(step, loss.item(), rebuilt[:3], flush=True)


if __name__ == "__main__":
    main()
