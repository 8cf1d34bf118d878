"""Writes a numbered snapshot after each step, and keeps the last three."""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from torch import nn


def snapshot(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 3) -> None:
    state = {"step": step, "weights": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / f"step_{step:08d}.pt")
    for old in sorted(folder.glob("step_*.pt"))[:-keep]:
        old.unlink()


def main(folder: Path, every: int) -> None:
    torch.manual_seed(6)
    model = nn.GRU(input_size=24, hidden_size=320, batch_first=True)
    head = nn.Linear(320, 24)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    series = torch.cumsum(torch.randn(500, 13, 24) * 0.2, dim=1)
    for step in itertools.count():
        rows = torch.randint(0, 500, (20,))
        past, future = series[rows, :-1], series[rows, 1:]
        hidden, _ = model(past)
        loss = nn.functional.mse_loss(head(hidden), future)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            snapshot(folder, step, model, optimizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), 2 if args.fixed else 1)
