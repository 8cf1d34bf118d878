"""One global training step as it was seen, and the sums the rest is folded from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

#: Phases with a clock of their own; `other` is what remains of the step.
TIMED = ("data", "h2d", "forward", "loss", "backward", "optimizer", "sync")


class StepRecord(NamedTuple):
    """A global step (after it, every optimizer in use has stepped once). Seconds.

    `total` runs from the end of the step before to the end of this one and includes `nograd` (work without
    gradients: evaluation, or a teacher network) and `checkpoint` (`torch.save`).
    `epochs` counts training iterators made in this step.
    `losses` are what the backward calls started from, one per call: floats on the CPU, detached scalar tensors
    elsewhere.
    """

    number: int
    at: float
    total: float
    data: float
    h2d: float
    forward: float
    loss: float
    backward: float
    optimizer: float
    sync: float
    nograd: float
    nograd_calls: int
    checkpoint: float
    batches: int
    epochs: int
    calls: int
    losses: tuple[Any, ...]
    steps: int = 1
    """More than one only where a window of steps was summed; `number` is then that of the last."""
    timed: int = 1
    """Of a window, the steps whose phases were timed; phases are scaled up from them, the rest is exact."""


def merged(records: Sequence[StepRecord]) -> StepRecord:
    """Steps that follow each other, one or more, as one window."""
    last = records[-1]
    sums = {
        name: sum(getattr(item, name) for item in records)
        for name in StepRecord._fields
        if name not in ("number", "at", "losses")
    }
    return last._replace(**sums, losses=tuple(itertools.chain.from_iterable(item.losses for item in records)))


def loss_values(record: StepRecord, limit: int = 8) -> tuple[float, ...]:
    """The step's losses as floats (synchronises with a device). Empty where no scalar loss was seen."""
    return tuple(float(item) for item in record.losses[:limit])


def total_loss(values: Sequence[float]) -> float | None:
    """Mean over the backward calls of a step (micro-batches, or several networks); None where none was seen."""
    if not values:
        return None
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def evaluates_apart(records: Sequence[StepRecord]) -> bool:
    """Whether work without gradients is evaluation (now and then) rather than part of every step (a teacher)."""
    if not records:
        return True
    return sum(1 for item in records if item.nograd_calls) < 0.6 * len(records)


def training_seconds(record: StepRecord, apart: bool = True) -> float:
    """Seconds of the step without checkpoints and, if it stands `apart`, without evaluation."""
    return max(record.total - record.checkpoint - (record.nograd if apart else 0.0), 0.0)


def median_of(values: Sequence[float]) -> float:
    """The median; 0.0 of nothing."""
    ordered = sorted(values)
    n = len(ordered)
    return 0.0 if n == 0 else (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0
