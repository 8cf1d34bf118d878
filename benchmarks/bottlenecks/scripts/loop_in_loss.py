"""A contrastive loss summed over pairs in Python."""

import argparse
import itertools

import torch
from torch import nn


def pair_loss(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            distance = (points[i] - points[j]).pow(2).sum()
            total = total + (distance if labels[i] == labels[j] else torch.relu(1 - distance))
    return total / len(points) ** 2


def pair_loss_at_once(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    distance = (points.unsqueeze(0) - points.unsqueeze(1)).pow(2).sum(2)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    return torch.where(same, distance, torch.relu(1 - distance)).triu(1).sum() / len(points) ** 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    criterion = pair_loss_at_once if args.fixed else pair_loss
    model = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(4096, 128), torch.randint(0, 4, (4096,))
    for _ in itertools.count():
        rows = torch.randint(4096, (16,))
        loss = criterion(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
