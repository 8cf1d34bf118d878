"""Convolutions in the channels-last format, with pictures in memory in that format too."""

import itertools

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(31)
    pictures = torch.rand(512, 16, 40, 40).contiguous(memory_format=torch.channels_last)
    labels = pictures[:, :8].mean(dim=(2, 3)).argmax(dim=1)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(inplace=True), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(128, 8),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    for step in itertools.count():
        at = step * 32 % 512
        loss = nn.functional.cross_entropy(model(pictures[at : at + 32]), labels[at : at + 32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(step, f"{loss.item():.3f}")


if __name__ == "__main__":
    main()
