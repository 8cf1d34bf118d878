"""Small pictures, augmented one pixel row at a time."""

import argparse
import itertools
import random

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    def __init__(self, n: int) -> None:
        self.pictures = torch.rand(n, 3, 24, 24)
        self.labels = torch.randint(0, 10, (n,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        picture = self.pictures[index].clone()
        for row in range(24):
            picture[:, row] = torch.roll(picture[:, row], random.randint(-2, 2), dims=1)
        return picture, self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    workers = 2 if args.fixed else 0
    loader = DataLoader(
        Pictures(4096), batch_size=32, shuffle=True, num_workers=workers, persistent_workers=bool(workers)
    )
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(),
                          nn.LazyLinear(10))  # fmt: skip
    model(torch.zeros(1, 3, 24, 24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    for _ in itertools.count():
        for pictures, labels in loader:
            loss = nn.functional.cross_entropy(model(pictures), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
