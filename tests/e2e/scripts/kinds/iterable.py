"""A stream: an IterableDataset that is shared out among its two workers, with a shuffle buffer."""

import random

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Stream(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        buffer = []
        for i in range(first, self.size, stride):
            x = torch.sin(torch.arange(8.0) * i)
            buffer.append((x, x.sum().unsqueeze(0)))
            if len(buffer) > 10:
                yield buffer.pop(random.randrange(len(buffer)))
        yield from buffer


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    loader = DataLoader(Stream(96), batch_size=8, num_workers=2)
    for epoch in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.smooth_l1_loss(model(x), y)
            loss.backward()
            optimizer.step()
            print(epoch, repr(loss.item()))
    torch.save(model.state_dict(), "checkpoint.pt")
