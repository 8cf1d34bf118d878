"""Signals from numpy are float64, and the model was made to fit them."""

import argparse
import itertools

import numpy as np
import torch
from torch import nn


def signals(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a pulse, and where the pulse is: (count, 1, length) and (count,)."""
    rng = np.random.default_rng(20)
    where = rng.integers(0, 8, count)
    wave = rng.normal(0, 0.3, (count, 1, length))
    for number, place in enumerate(where):
        wave[number, 0, place * (length // 8) : place * (length // 8) + 8] += 1.0
    return wave, where


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(20)
    wave, where = signals(2048, 256)
    x, y = torch.from_numpy(wave), torch.from_numpy(where)
    model = nn.Sequential(
        nn.Conv1d(1, 32, 9, stride=2, padding=4), nn.ReLU(), nn.Conv1d(32, 64, 9, stride=2, padding=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 64, 256), nn.ReLU(), nn.Linear(256, 8),
    )  # fmt: skip
    if args.fixed:
        x = x.float()
    else:
        model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in itertools.count():
        rows = torch.randint(0, 2048, (64,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(step, f"{loss.item():.4f}")


if __name__ == "__main__":
    main()
