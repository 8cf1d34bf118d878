"""A tiny training script with known properties. What is planted in it is named on its command line.

`--waste sleep:0.03` spends 3 % of each step on nothing, so that the same script without it is 3 % faster.
`--fault KIND` does a known harm of `--size` from `--from-step` on. Without them two runs are identical, bit for bit.

The share wasted is taken of data, forward and backward; the optimizer's step is short here. What a fault draws at
random comes from generators of its own, so that it moves no other random stream.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

CLASSES = 10

#: Kind -> what `--size` means for it.
FAULTS = {
    "loss_scale": "gradients are too large by this share",
    "dropped_gradient": "the gradient of one layer is too small by this share (1: dropped)",
    "frozen_norm": "batch normalisation stays as in evaluation",
    "cached_transform": "share of the samples whose random transform is drawn once",
    "shuffled_labels": "share of the labels that belong to another sample",
    "state_reset": "the optimizer forgets its state every so many steps",
    "dropout_off": "dropout is too low by this share (1: off)",
    "wrong_eps": "the optimizer's eps",
    "fused_strides": "a fused optimizer works on memory of mixed layout",
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("mlp", "conv", "attention"), default="conv")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--waste", default="none", help="none, sleep:SHARE or arithmetic:SHARE")
    parser.add_argument("--fault", choices=("none", *FAULTS), default="none")
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--from-step", type=int, default=0)
    return parser.parse_args()


def model_of(kind: str, dropout: float) -> Any:
    """A network from images (3, 16, 16), or 16 vectors of 48 values, to class scores."""
    from torch import nn

    class Attention(nn.Module):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.inside = nn.Linear(48, width)
            self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, batch_first=True, norm_first=True)
            self.outside = nn.Linear(width, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.outside(self.block(self.inside(x.reshape(len(x), 16, 48))).mean(1))

    if kind == "attention":
        return Attention()
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, CLASSES),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 64, CLASSES),
    )  # fmt: skip


class Data:
    """Noisy images of ten random patterns, with a random shift and fresh noise at each use."""

    def __init__(self, seed: int, samples: int = 4096) -> None:
        """
        Args:
            seed: of the patterns, and of every draw.
        """
        import torch

        self.torch = torch
        self.first = seed * 10**8
        self.generator = torch.Generator()
        self.generator.manual_seed(self.first + 1)
        self.patterns = torch.randn(CLASSES, 3, 16, 16, generator=self.generator)
        self.labels = torch.randint(CLASSES, (samples,), generator=self.generator)
        self.cached = 0.0
        """Share of the samples whose transform is always the same."""

    def batch(self, number: int, size: int) -> tuple[Any, Any]:
        """Images and labels of batch `number`."""
        torch, generator = self.torch, self.generator
        generator.manual_seed(self.first + 100 + number)
        chosen = torch.randint(len(self.labels), (size,), generator=generator)
        noise = torch.randn(size, 3, 16, 16, generator=generator)
        shift = int(torch.randint(-2, 3, (1,), generator=generator))
        for place in (chosen < self.cached * len(self.labels)).nonzero().flatten().tolist():
            generator.manual_seed(self.first + 10**7 + int(chosen[place]))
            noise[place] = torch.randn(3, 16, 16, generator=generator)
        labels = self.labels[chosen]
        return torch.roll(self.patterns[labels], shift, dims=3) + 4.0 * noise, labels


def waste(kind: str, seconds: float, block: Any) -> None:
    """Spend so many seconds asleep, or on arithmetic nobody needs."""
    until = time.perf_counter() + seconds
    if kind == "sleep":
        # A sleep ends late by the timer slack of the kernel (50 us); the rest is waited for awake.
        time.sleep(max(seconds - 6e-5, 0.0))
    while time.perf_counter() < until:
        if kind == "arithmetic":
            block @ block


def main() -> None:
    """Train until killed, or for `--steps`."""
    import torch

    args = arguments()
    torch.manual_seed(args.seed)
    fault = args.fault
    model = model_of(args.model, args.dropout)
    data = Data(args.seed)
    eps = args.size if fault == "wrong_eps" else 1e-8
    fused = fault == "fused_strides"
    optimizer: Any
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=eps, fused=fused)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.004, momentum=0.9, fused=fused)
    layer = [parameter for parameter in model.parameters() if parameter.dim() > 1][1]
    kind, _, share = args.waste.partition(":")
    block = torch.ones(32, 32)

    for step in range(args.steps):
        began = time.perf_counter()
        wrong = step >= args.from_step
        if wrong and step == args.from_step:
            data.cached = args.size if fault == "cached_transform" else 0.0
            for module in model.modules():
                if fault == "frozen_norm" and isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
                if fault == "dropout_off" and isinstance(module, torch.nn.Dropout):
                    module.p *= 1.0 - args.size
        for micro in range(args.accumulate):
            images, labels = data.batch(step * args.accumulate + micro, args.batch_size)
            if fault == "shuffled_labels" and wrong:
                count = round(args.size * len(labels))
                labels[:count] = labels.roll(1)[:count]
            loss = torch.nn.functional.cross_entropy(model(images), labels) / args.accumulate
            loss.backward()
        if wrong and fault == "loss_scale":
            for parameter in model.parameters():
                parameter.grad.mul_(1.0 + args.size)
        if wrong and fault == "dropped_gradient":
            layer.grad.mul_(1.0 - args.size)
        if wrong and fault == "state_reset" and (step - args.from_step) % int(args.size) == 0:
            optimizer.state.clear()
        if share:
            waste(kind, float(share) * (time.perf_counter() - began), block)
        optimizer.step()
        optimizer.zero_grad()
        if fused and step == args.from_step:
            model.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
