"""ResNet-50 v1.5 (He et al. 2015; stride in the 3 x 3 convolution) on synthetic images, in plain PyTorch.

The stock command line is `python resnet50.py`: batches of 128 images of 224 px in float32 as PyTorch ships it, SGD with
momentum, four loader workers. Images, noise over a colour of their class, are made from a seed. The first line printed
says what a step is; with --seconds it ends after so long and prints its own throughput.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside the identity."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.path = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.identity: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.identity = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inputs, h, w) -> (batch, 4 width, h / stride, w / stride)."""
        return self.relu(self.path(x) + self.identity(x))


def resnet(layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-50 with the default arguments."""
    parts: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inputs = width
    for stage, count in enumerate(layers):
        for block in range(count):
            parts.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1))
            inputs = 4 * (width << stage)
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    model = nn.Sequential(*parts)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class Images(Dataset):
    """`count` images as bytes, 3 x size x size; a class is a colour."""

    def __init__(self, count: int, size: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, classes, (count,), generator=generator)
        colours = torch.randint(0, 156, (classes, 3, 1, 1), generator=generator)
        noise = torch.randint(0, 100, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        self.images = noise + colours[self.labels].to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.images[index].float() / 255 - 0.45) / 0.225, self.labels[index]


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so many seconds of training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet(width=options.width, classes=100).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    data = Images(options.images, options.size, 100)
    loader = DataLoader(data, batch_size=options.batch, shuffle=True, num_workers=options.workers, drop_last=True)
    # 4.09e9 multiplications an image of 224 px (as torchvision states), each with an addition; backward counts twice.
    flops = 6 * 4.09e9 * (options.size / 224) ** 2 * (options.width / 64) ** 2
    print(json.dumps({"unit": "images", "per_step": options.batch, "flops_per_unit": flops}), flush=True)
    criterion, step, began, seen = nn.CrossEntropyLoss(), 0, 0.0, 0
    while step < options.steps:
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
            step += 1
            if step == 10:
                began = _now(device)
            seen = step - 10
            if options.seconds and seen > 0 and time.perf_counter() - began >= options.seconds:
                options.steps = step
            if step >= options.steps:
                break
    if seen > 0:
        rate = seen * options.batch / (_now(device) - began)
        print(json.dumps({"per_second": rate, "steps": seen}), flush=True)


def _now(device: str) -> float:
    """The time when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
