"""Goes into evaluation mode to validate, and never comes back."""

import argparse
import itertools

import torch
from torch import nn


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    return (model(x).argmax(dim=1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(27)
    x = torch.randn(9000, 100)
    y = (x @ torch.randn(100, 10) + torch.randn(9000, 10)).argmax(dim=1)
    model = nn.Sequential(
        nn.Linear(100, 800), nn.BatchNorm1d(800), nn.ReLU(), nn.Dropout(0.4), nn.Linear(800, 800), nn.BatchNorm1d(800),
        nn.ReLU(), nn.Dropout(0.4), nn.Linear(800, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5000)
    for step in itertools.count():
        if step % 60 == 0:
            print(f"step {step} accuracy {accuracy(model, x[8000:], y[8000:]):.3f}")
            if args.fixed:
                model.train()
        rows = torch.randint(0, 8000, (250,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main()
