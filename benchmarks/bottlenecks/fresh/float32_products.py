"""Feed-forward blocks of a transformer in float32: nearly all of it is matrix products."""

import argparse
import itertools

import torch
from torch import nn


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(22)
    model = nn.Sequential(FeedForward(512), FeedForward(512), nn.Linear(512, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.randn(8192, 512)
    target = torch.roll(data[:, :64], 1, dims=1)
    for step in itertools.count():
        at = step * 512 % 8192
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.fixed):
            loss = nn.functional.mse_loss(model(data[at : at + 512]), target[at : at + 512])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
