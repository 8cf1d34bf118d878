"""Counters of a run that may have been started several times: their sums, and entries of a ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from upshift.records.ledger import Entry
from upshift.records.quantity import Basis, Quantity, unknown
from upshift.records.resources import Sample

Starts = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Sum:
    """A counter over all starts: its sum, the seconds until it was last read, and how often it was."""

    value: float
    covered: float
    n: int


def good(value: float | None) -> TypeGuard[float]:
    """Whether it can be a sum, a time or a share: damaged records hold anything."""
    return value is not None and math.isfinite(value) and value >= 0.0


def entry(
    value: float | None, unit: str, how: str, *, basis: Basis = "measured", n: int = 0, low: float | None = None,
    high: float | None = None,
) -> Entry:  # fmt: skip
    """A figure; unknown where the value is none, or no sum."""
    if not good(value):
        return Entry(unknown(unit), how)
    low = low if good(low) else None
    high = high if good(high) else None
    return Entry(Quantity(value, unit, low, high, n, basis), how)


def by_start(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples by start: where their time falls, counters began anew."""
    found: list[list[Sample]] = []
    for sample in samples:
        if not good(sample.at):
            continue
        if not found or sample.at < found[-1][-1].at:
            found.append([])
        found[-1].append(sample)
    return found


def summed(starts: Starts, read: Callable[[Sample], float | None]) -> Sum | None:
    """The last known reading of each start, added up; None where there is none."""
    value, covered, n = 0.0, 0.0, 0
    for samples in starts:
        known = [(sample.at, found) for sample in samples if good(found := read(sample))]
        if known:
            value, covered, n = value + known[-1][1], covered + known[-1][0], n + len(known)
    return Sum(value, covered, n) if n else None
