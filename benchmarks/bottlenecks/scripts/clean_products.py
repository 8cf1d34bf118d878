"""Large products and little else: close to what the machine can do."""

import itertools

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features = torch.randn(8192, 1024)
    for step in itertools.count():
        batch = features[step * 1024 % 8192 :][:1024]
        loss = nn.functional.mse_loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
