"""What the loops of `overhead.py` train, and the clock that times them: the same for every framework.

MLP 64-128-10 with AdamW, or with `--tiny` on the command line one layer of 18 parameters with plain SGD; batches of 32
of samples in memory, whose labels can be learned, so that an arm that does not train is noticed.
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH = 8192, 32
TINY = "--tiny" in sys.argv
INPUTS, HIDDEN, CLASSES = (8, 0, 2) if TINY else (64, 128, 10)

_draw = torch.Generator().manual_seed(0)
X = torch.randn(SAMPLES, INPUTS, generator=_draw)
Y = (X @ torch.randn(INPUTS, CLASSES, generator=_draw)).argmax(1)
optimizer = partial(torch.optim.SGD, lr=0.1) if TINY else partial(torch.optim.AdamW, lr=1e-3)


def model() -> torch.nn.Module:
    """The MLP, or one layer."""
    if TINY:
        return torch.nn.Linear(INPUTS, CLASSES)
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES))


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    """torch's DataLoader over the data, shuffled, without workers."""
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH, shuffle=True)


class Clock:
    """Cross entropy that notes the thread's CPU time at two of its calls, and the loss at the first and the last."""

    def __init__(self, steps: int) -> None:
        self.first, self.last, self.calls = steps // 4, steps, 0
        self.began = self.ended = 0.0
        self.losses: list[float] = []

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(output, target)
        if output.requires_grad:
            self.calls += 1
            if self.calls == self.first:
                self.began = time.thread_time()
            elif self.calls == self.last:
                self.ended = time.thread_time()
            if self.calls in (1, self.last):
                self.losses.append(loss.item())
        return loss

    @property
    def microseconds(self) -> float:
        """Microseconds a step."""
        return (self.ended - self.began) / (self.last - self.first) * 1e6

    def problem(self) -> str:
        """Why this was no training of so many steps; empty where it was one."""
        if self.calls < self.last:
            return f"trained {self.calls} of {self.last} steps"
        if not all(math.isfinite(loss) for loss in self.losses) or self.losses[1] >= self.losses[0]:
            return f"did not learn: loss {self.losses[0]:.3g}, then {self.losses[1]:.3g}"
        return ""
