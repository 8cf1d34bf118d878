"""Text as one long tensor; each batch is stacked from slices by hand."""

import argparse
import itertools

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.mix = nn.Linear(15 * 16, 128)
        self.head = nn.Linear(128, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(self.embed(tokens).flatten(1))))


def get_batch(text: torch.Tensor, size: int, length: int) -> torch.Tensor:
    starts = [int(torch.randint(len(text) - length, (1,))) for _ in range(size)]
    return torch.stack([text[start : start + length].long() for start in starts])


def get_batch_at_once(text: torch.Tensor, size: int, length: int) -> torch.Tensor:
    starts = torch.randint(len(text) - length, (size, 1))
    return text[starts + torch.arange(length)].long()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    text = torch.randint(0, 128, (1_000_000,), dtype=torch.uint8)
    make = get_batch_at_once if args.fixed else get_batch
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in itertools.count():
        tokens = make(text, 256, 16)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
