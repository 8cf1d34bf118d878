"""Segmentation of crops of any size, compiled anew for each of them."""

import argparse
import itertools
import random

import torch
import torch._dynamo
from torch import nn


class Segmenter(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.down(image))
        return self.out(x + torch.relu(self.middle(x)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(8)
    random.seed(8)
    torch._dynamo.config.recompile_limit = 4096
    torch._dynamo.config.accumulated_recompile_limit = 4096
    net = Segmenter()
    fast_net = torch.compile(net, backend="aot_eager", dynamic=args.fixed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    scene = torch.rand(16, 1, 96, 96)
    mask = (nn.functional.avg_pool2d(scene, 5, stride=1, padding=2) > 0.5).float()
    for _ in itertools.count():
        height, width = random.randint(24, 96), random.randint(24, 96)
        loss = nn.functional.binary_cross_entropy_with_logits(
            fast_net(scene[:4, :, :height, :width]), mask[:4, :, :height, :width]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
