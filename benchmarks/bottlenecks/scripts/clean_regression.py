"""A wide network on a table in memory, with a fused optimizer and a log now and then."""

import itertools

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    features, target = torch.randn(16_384, 512), torch.randn(16_384, 1)
    for step in itertools.count():
        start = step * 512 % 16_384
        loss = nn.functional.mse_loss(model(features[start : start + 512]), target[start : start + 512])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(step, loss.item())


if __name__ == "__main__":
    main()
