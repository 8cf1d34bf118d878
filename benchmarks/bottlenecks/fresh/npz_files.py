"""Recordings of a sensor, one compressed numpy archive each."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


def record(folder: Path, count: int) -> None:
    """Write sine waves whose frequency is the class."""
    rng = np.random.default_rng(4)
    time = np.linspace(0, 1, 400)
    for number in range(count):
        kind = int(rng.integers(8))
        wave = np.sin(2 * np.pi * (kind + 2) * time + rng.uniform(0, 6)) + rng.normal(0, 0.5, 400)
        np.savez_compressed(folder / f"rec_{number}.npz", wave=wave.astype(np.float32), kind=kind)


class Recordings(Dataset):
    def __init__(self, folder: Path, in_memory: bool) -> None:
        self.paths = list(folder.iterdir())
        self.memory = [self.read(path) for path in self.paths] if in_memory else []

    @staticmethod
    def read(path: Path) -> tuple[np.ndarray, int]:
        with np.load(path) as archive:
            return archive["wave"], int(archive["kind"])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.memory[index] if self.memory else self.read(self.paths[index])


def train(folder: Path, fixed: bool) -> None:
    torch.manual_seed(4)
    loader = DataLoader(Recordings(folder, fixed), batch_size=24, shuffle=True)
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    while True:
        for wave, kind in loader:
            optimizer.zero_grad(set_to_none=True)
            criterion(model(wave), kind).backward()
            optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        record(Path(name), 720)
        train(Path(name), options.fixed)
