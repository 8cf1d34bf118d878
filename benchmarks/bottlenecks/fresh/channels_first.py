"""Pictures stored channels-last, made contiguous channels-first for a residual network."""

import argparse
import itertools

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.second(torch.relu(self.first(x)))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(14)
    photos = np.random.default_rng(14).random((512, 48, 48, 3), dtype=np.float32)
    labels = torch.from_numpy(photos[:, 10:38, 10:38].mean((1, 2)).argmax(1))
    net = nn.Sequential(
        nn.Conv2d(3, 48, 3, stride=2, padding=1), nn.ReLU(), Block(48), Block(48), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    if args.fixed:
        net = net.to(memory_format=torch.channels_last)
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in itertools.count():
        at = step * 32 % 512
        batch = torch.from_numpy(photos[at : at + 32]).permute(0, 3, 1, 2)
        if not args.fixed:
            batch = batch.contiguous()
        loss = nn.functional.cross_entropy(net(batch), labels[at : at + 32])
        opt.zero_grad()
        loss.backward()
        opt.step()


if __name__ == "__main__":
    main()
