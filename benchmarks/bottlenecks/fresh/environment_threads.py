"""One thread, asked for in the environment before torch is imported, as cluster templates do."""

import itertools
import os
import sys

if "--fixed" not in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(16)
    encoder = nn.Sequential(nn.Linear(784, 900), nn.ReLU(), nn.Linear(900, 900), nn.ReLU(), nn.Linear(900, 32))
    decoder = nn.Sequential(nn.Linear(32, 900), nn.ReLU(), nn.Linear(900, 784))
    autoencoder = nn.Sequential(encoder, decoder)
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=0.5)
    basis = torch.randn(12, 784) / 4
    for step in itertools.count():
        images = torch.sigmoid(torch.randn(300, 12) @ basis)
        loss = nn.functional.mse_loss(autoencoder(images), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
