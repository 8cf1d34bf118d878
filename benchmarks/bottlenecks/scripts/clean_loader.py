"""Whole tensors behind a loader that costs next to nothing."""

import itertools

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


def main() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8192, 768), torch.randint(0, 10, (8192,)))
    sampler = BatchSampler(RandomSampler(data), batch_size=512, drop_last=True)
    loader = DataLoader(data, sampler=sampler, batch_size=None)
    model = nn.Sequential(nn.Linear(768, 1536), nn.ReLU(), nn.Linear(1536, 1536), nn.ReLU(), nn.Linear(1536, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    for _ in itertools.count():
        for features, labels in loader:
            loss = nn.functional.cross_entropy(model(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
