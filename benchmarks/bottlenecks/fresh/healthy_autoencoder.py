"""A wide autoencoder on large batches that lie in memory: products, and little else."""

import itertools

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(30)
    model = nn.Sequential(
        nn.Linear(1024, 1536), nn.ReLU(), nn.Linear(1536, 256), nn.ReLU(), nn.Linear(256, 1536), nn.ReLU(),
        nn.Linear(1536, 1024),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    data = torch.randn(8192, 64) @ torch.randn(64, 1024) / 8
    for epoch in itertools.count():
        for batch in data.split(1024):
            loss = nn.functional.mse_loss(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
