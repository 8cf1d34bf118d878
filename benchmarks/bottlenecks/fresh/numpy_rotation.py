"""Pictures turned by a random angle, with bilinear sampling written in numpy."""

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


def rotate(picture: np.ndarray, angle: float) -> np.ndarray:
    """Turn a (channels, height, width) picture around its middle."""
    _, height, width = picture.shape
    ys, xs = np.meshgrid(np.arange(height) - height / 2, np.arange(width) - width / 2, indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    from_x = np.clip(c * xs + s * ys + width / 2, 0, width - 1.001)
    from_y = np.clip(c * ys - s * xs + height / 2, 0, height - 1.001)
    x0, y0 = from_x.astype(int), from_y.astype(int)
    dx, dy = from_x - x0, from_y - y0
    above = picture[:, y0, x0] * (1 - dx) + picture[:, y0, x0 + 1] * dx
    below = picture[:, y0 + 1, x0] * (1 - dx) + picture[:, y0 + 1, x0 + 1] * dx
    return (above * (1 - dy) + below * dy).astype(np.float32)


class Turned(Dataset):
    def __init__(self, pictures: np.ndarray, targets: np.ndarray) -> None:
        self.pictures, self.targets = pictures, targets

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int):
        return rotate(self.pictures[i], np.random.uniform(-0.5, 0.5)), self.targets[i]


class Brightness(nn.Module):
    """Tells the mean colour of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, kernel_size=8, stride=4)
        self.body = nn.Conv2d(16, 32, kernel_size=3, stride=2)
        self.out = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(F.relu(self.stem(x))))
        return self.out(x.mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(7)
    pictures = rng.random((2000, 3, 64, 64), dtype=np.float32) * rng.random((2000, 3, 1, 1), dtype=np.float32)
    data = Turned(pictures, pictures.mean((2, 3)))
    extra = {"num_workers": 2, "persistent_workers": True} if args.fixed else {}
    train = DataLoader(data, batch_size=32, shuffle=True, drop_last=True, **extra)
    model = Brightness()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(100_000):
        for x, y in train:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
