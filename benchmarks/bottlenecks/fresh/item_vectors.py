"""Users and items as rows of two large tables, of which a step reads a few hundred."""

import argparse
import itertools

import torch
from torch import nn


class Factors(nn.Module):
    def __init__(self, users: int, items: int, rank: int, sparse: bool) -> None:
        super().__init__()
        self.users = nn.Embedding(users, rank, sparse=sparse)
        self.items = nn.Embedding(items, rank, sparse=sparse)
        nn.init.normal_(self.users.weight, std=0.05)
        nn.init.normal_(self.items.weight, std=0.05)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.users(user) * self.items(item)).sum(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(12)
    users, items = 250_000, 120_000
    model = Factors(users, items, 24, sparse=args.fixed)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    liked = torch.randint(0, items, (users,))
    for _ in itertools.count():
        user = torch.randint(0, users, (256,))
        other = torch.randint(0, items, (256,))
        better = model(user, liked[user]) - model(user, other)
        loss = -nn.functional.logsigmoid(better).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
