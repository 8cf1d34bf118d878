"""Four large micro-batches a step, an evaluation now and then."""

import itertools

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features = torch.randn(4096, 1024)
    for step in itertools.count():
        optimizer.zero_grad()
        for part in range(4):
            batch = features[(step * 4 + part) * 256 % 4096 :][:256]
            (nn.functional.mse_loss(model(batch), batch) / 4).backward()
        optimizer.step()
        if step % 100 == 99:
            model.eval()
            with torch.no_grad():
                print(step, float(nn.functional.mse_loss(model(features[:512]), features[:512])))
            model.train()


if __name__ == "__main__":
    main()
