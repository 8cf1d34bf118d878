"""Digits as bytes, contrast stretched by a Python loop over their pixels."""

import argparse
import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Digits(Dataset):
    """Noise with a bright bar, whose row is the class."""

    def __init__(self, n: int, side: int = 20) -> None:
        rng = np.random.default_rng(1)
        self.labels = rng.integers(0, 10, n)
        self.images = rng.integers(0, 160, (n, side, side), dtype=np.uint8)
        self.images[np.arange(n), self.labels * 2] += 90

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        height, width = image.shape
        gain = random.uniform(0.8, 1.2)
        out = np.zeros((1, height, width), dtype=np.float32)
        for y in range(height):
            for x in range(width):
                value = float(image[y, x]) * gain
                out[0, y, x] = 1.0 if value > 255.0 else value / 255.0
        return torch.from_numpy(out), int(self.labels[index])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    fixed = parser.parse_args().fixed
    torch.manual_seed(1)
    loader = DataLoader(
        Digits(6000), batch_size=50, shuffle=True, num_workers=2 if fixed else 0, persistent_workers=fixed
    )
    net = nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in itertools.count():
        total = torch.zeros(())
        for images, labels in loader:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            opt.step()
            total += loss.detach()
        print(f"epoch {epoch}: loss {total.item() / len(loader):.3f}")


if __name__ == "__main__":
    main()
