"""Short epochs, whose loader starts its workers anew each time."""

import argparse
import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(640, 128), torch.randint(0, 5, (640,)))
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=2, persistent_workers=args.fixed)
    model = nn.Sequential(nn.Linear(128, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    for _ in itertools.count():
        for features, labels in loader:
            loss = nn.functional.cross_entropy(model(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
