"""A large table of item vectors, whose gradient is as large as the table."""

import argparse
import itertools

import torch
from torch import nn


class Recommender(nn.Module):
    def __init__(self, items: int, sparse: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(items, 32, sparse=sparse)
        self.score = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.score(self.items(pairs).flatten(1)).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    items = 200_000
    model = Recommender(items, args.fixed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in itertools.count():
        pairs = torch.randint(items, (256, 2))
        liked = (pairs[:, 0] % 2).float()
        loss = nn.functional.binary_cross_entropy_with_logits(model(pairs), liked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
