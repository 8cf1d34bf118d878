"""A table that numpy read as float64, and a model that was made to fit."""

import argparse
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    features, target = torch.randn(8192, 256, dtype=torch.float64), torch.randn(8192, 1, dtype=torch.float64)
    if args.fixed:
        features, target = features.float(), target.float()
    model = nn.Sequential(nn.Linear(256, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 1))
    model = model.to(features.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in itertools.count():
        rows = torch.randint(8192, (256,))
        loss = nn.functional.mse_loss(model(features[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
