"""Appends every prediction of every step to a file of JSON lines."""

import argparse
import itertools
import json
import tempfile
from typing import TextIO

import torch
from torch import nn


class Journal:
    """What the network said, for later study."""

    def __init__(self, stream: TextIO, every: int) -> None:
        self.stream, self.every = stream, every

    def write(self, step: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        if step % self.every:
            return
        for probabilities, label in zip(logits.softmax(dim=1), labels, strict=True):
            entry = {"step": step, "label": int(label), "p": [round(float(p), 5) for p in probabilities]}
            self.stream.write(json.dumps(entry) + "\n")
            self.stream.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    every = 50 if parser.parse_args().fixed else 1
    torch.manual_seed(21)
    table = torch.randn(8000, 64)
    classes = (table[:, :5] + 0.1 * torch.randn(8000, 5)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(64, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryFile("w") as stream:
        journal = Journal(stream, every)
        for step in itertools.count():
            at = step * 100 % 8000
            x, y = table[at : at + 100], classes[at : at + 100]
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            journal.write(step, logits.detach(), y)


if __name__ == "__main__":
    main()
