"""Leaky neurons, integrated over time by a Python loop."""

import argparse
import itertools

import torch
from torch import nn

STEPS = 120


class Leaky(nn.Module):
    """v[t] = decay * v[t-1] + x[t], over the second axis of (batch, time, neurons)."""

    def __init__(self, decay: float, by_product: bool) -> None:
        super().__init__()
        self.decay, self.by_product = decay, by_product
        lag = torch.arange(STEPS)[:, None] - torch.arange(STEPS)[None, :]
        self.register_buffer("filter", torch.where(lag >= 0, decay ** lag.clamp(min=0).float(), 0.0))

    def forward(self, current: torch.Tensor) -> torch.Tensor:
        if self.by_product:
            return self.filter @ current
        voltage = torch.zeros_like(current[:, 0])
        trace = []
        for t in range(current.shape[1]):
            voltage = self.decay * voltage + current[:, t]
            trace.append(voltage)
        return torch.stack(trace, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(10, 48), Leaky(0.9, args.fixed), nn.Sigmoid(), nn.Linear(48, 48), Leaky(0.8, args.fixed),
        nn.Sigmoid(), nn.Linear(48, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    spikes = (torch.rand(1024, STEPS, 10) < 0.1).float()
    target = spikes[:, :, :4].cumsum(dim=1) / 12
    for step in itertools.count():
        rows = torch.randint(0, 1024, (16,))
        loss = (model(spikes[rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(step, round(loss.item(), 4))


if __name__ == "__main__":
    main()
