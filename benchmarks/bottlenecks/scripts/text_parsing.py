"""A table whose rows are kept as text and parsed whenever they are read."""

import argparse
import itertools
import json
import random

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, lines: list[str], parsed: bool) -> None:
        self.lines = lines
        self.ready = [self.parse(line) for line in lines] if parsed else None

    @staticmethod
    def parse(line: str) -> tuple[torch.Tensor, torch.Tensor]:
        record = json.loads(line)
        features = [float(value) for value in record["features"].split(",")]
        return torch.tensor(features), torch.tensor(record["target"])

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ready[index] if self.ready is not None else self.parse(self.lines[index])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        json.dumps({"features": ",".join(f"{random.gauss(0, 1):.6f}" for _ in range(200)), "target": random.random()})
        for _ in range(2000)
    ]
    loader = DataLoader(Rows(lines, args.fixed), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(200, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in itertools.count():
        for features, target in loader:
            loss = nn.functional.mse_loss(model(features).squeeze(1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
