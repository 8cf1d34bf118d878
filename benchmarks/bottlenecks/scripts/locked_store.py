"""Loader workers that share a store which lets one of them in at a time."""

import argparse
import contextlib
import itertools
import multiprocessing
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Store(Dataset):
    """A store that takes a millisecond and a half to answer."""

    def __init__(self, n: int, locked: bool) -> None:
        self.rows = torch.randn(n, 128)
        self.values = self.rows[:, :16].sum(dim=1, keepdim=True)
        self.lock = multiprocessing.Lock() if locked else contextlib.nullcontext()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self.lock:
            time.sleep(0.0015)
            return self.rows[index], self.values[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(9)
    loader = DataLoader(
        Store(3200, locked=not args.fixed), batch_size=16, shuffle=True, num_workers=2, persistent_workers=True
    )
    model = nn.Sequential(nn.Linear(128, 600), nn.ELU(), nn.Linear(600, 600), nn.ELU(), nn.Linear(600, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    for epoch in itertools.count():
        for rows, values in loader:
            loss = nn.functional.l1_loss(model(rows), values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("epoch", epoch, "loss", loss.item())


if __name__ == "__main__":
    main()
