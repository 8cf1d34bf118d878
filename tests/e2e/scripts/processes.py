"""Trainings that start processes of their own: loader workers, pools, torch's spawn."""

import multiprocessing
import sys

import torch
import torch.multiprocessing
from torch import nn
from torch.utils.data import DataLoader, Dataset

print("imported as", __name__, "with", sys.argv[1:] if __name__ == "__main__" else "")


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.full((3,), float(i)) + torch.rand(3), torch.tensor([float(i % 2)])


def fit(seed, **loader):
    torch.manual_seed(seed)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        for x, y in DataLoader(Numbers(), batch_size=4, shuffle=True, **loader):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def in_process(rank, queue):
    queue.put(fit(rank))


if __name__ == "__main__":
    torch.manual_seed(0)
    print("pool", multiprocessing.get_context("fork").Pool(2).map(fit, [1, 2]))
    print("fork", repr(fit(3, num_workers=2, persistent_workers=True)))
    print("spawn", repr(fit(4, num_workers=1, multiprocessing_context="spawn")))
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(in_process, (queue,), nprocs=1)
    print("torch spawn", queue.get())
