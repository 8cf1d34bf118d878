"""A table with one learnt vector and one bias for each column: hundreds of tiny parameters."""

import argparse
import itertools

import torch
from torch import nn


class ColumnTokens(nn.Module):
    """(batch, columns) numbers as (batch, columns, width) tokens."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.scale = nn.ParameterList(torch.randn(width) * 0.1 for _ in range(columns))
        self.shift = nn.ParameterList(torch.zeros(width) for _ in range(columns))

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return table.unsqueeze(-1) * torch.stack(list(self.scale)) + torch.stack(list(self.shift))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    options = {"fused": True} if parser.parse_args().fixed else {}
    torch.manual_seed(13)
    columns, width = 180, 8
    model = nn.Sequential(
        ColumnTokens(columns, width), nn.ReLU(), nn.Flatten(), nn.Linear(columns * width, 64), nn.ReLU(),
        nn.Linear(64, 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, **options)
    table = torch.randn(5000, columns)
    outcome = table[:, :10].prod(dim=1, keepdim=True) + table[:, 10:11]
    for step in itertools.count():
        rows = slice(step * 50 % 5000, step * 50 % 5000 + 50)
        loss = nn.functional.mse_loss(model(table[rows]), outcome[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step} loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
