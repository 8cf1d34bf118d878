"""A small transformer that steps after every single sequence."""

import argparse
import itertools

import torch
from torch import nn


class Parity(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, width)
        self.place = nn.Parameter(torch.randn(24, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=96, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=3)
        self.head = nn.Linear(width, 2)

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(bits) + self.place).mean(dim=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    size = 2 if parser.parse_args().fixed else 1
    torch.manual_seed(3)
    bits = torch.randint(0, 2, (10_000, 24))
    answers = bits[:, :3].sum(dim=1) % 2
    model = Parity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in itertools.count():
        first = step * size % len(bits)
        loss = nn.functional.cross_entropy(model(bits[first : first + size]), answers[first : first + size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"{step=} loss={loss.item():.3f}")


if __name__ == "__main__":
    main()
