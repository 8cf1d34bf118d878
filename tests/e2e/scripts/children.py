"""Trainings in children of every kind, each with a loader worker of its own; the parent only waits.

With the argument `serial` the same trainings, one after the other in one process.
"""

import multiprocessing
import os
import sys

import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None and hasattr(torch.nn.Module.__call__, "__wrapped__"):
            raise RuntimeError("a loader worker was touched")
        return torch.full((3,), float(i))


def train(seed, context=None):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    workers = {"num_workers": 1, "multiprocessing_context": context} if context else {}
    for x in DataLoader(Numbers(), batch_size=2, shuffle=True, **workers):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    print(f"{seed} {loss.item()!r}\n", end="", flush=True)
    if seed == 3 and context:
        sys.exit(5)


def idle(seed):
    print(f"{seed} idle {torch.ones(2).sum().item()}\n", end="", flush=True)


def in_children():
    fork, spawn, server = (multiprocessing.get_context(name) for name in ("fork", "spawn", "forkserver"))
    children = [
        fork.Process(target=train, args=(1, "fork")),
        server.Process(target=train, args=(2, "fork")),
        spawn.Process(target=train, args=(3, "spawn")),
        fork.Process(target=idle, args=(4,)),
    ]
    for child in children:
        child.start()
    forked = os.fork()
    if not forked:
        train(5, "fork")
        sys.exit(6)
    print("forked", os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
    for child in children:
        child.join()
    print("codes", [child.exitcode for child in children])


if __name__ == "__main__":
    if sys.argv[1:] == ["serial"]:
        for seed in (1, 2, 3, 5):
            train(seed)
    else:
        in_children()
