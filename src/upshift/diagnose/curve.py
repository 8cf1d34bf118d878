"""A loss curve against its own noise: has it fallen, and how far would it still fall?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from upshift.measure.stats import long_run_variance, t_quantile

#: Values of a curve below which nothing is said.
LEAST = 40
#: One-sided.
LEVEL = 0.99


class Fall(NamedTuple):
    """How far the loss fell from the first to the last fifth of the steps, with one-sided 99 % bounds."""

    first: float
    last: float
    low: float
    high: float


def fall(curve: Sequence[float]) -> Fall | None:
    """First fifth against last fifth; None below `LEAST` values."""
    if len(curve) < LEAST:
        return None
    n = len(curve) // 5
    first, last = curve[:n], curve[-n:]
    error = math.sqrt((long_run_variance(first) + long_run_variance(last)) / n) * t_quantile(LEVEL, n - 1)
    before, after = math.fsum(first) / n, math.fsum(last) / n
    return Fall(before, after, before - after - error, before - after + error)


def drop(curve: Sequence[float]) -> float | None:
    """How far the loss fell from its first value to the last fifth; None where that is within five deviations."""
    if len(curve) < LEAST:
        return None
    last = curve[-(len(curve) // 5) :]
    fell = curve[0] - math.fsum(last) / len(last)
    return fell if fell > 5 * math.sqrt(long_run_variance(last)) else None


def still_to_fall(curve: Sequence[float], stride: int, total: int) -> float | None:
    """The most (99 %) the loss would still fall until step `total`, by the trend of the later half of `curve`.

    The trend is a line in the logarithm of the step, since losses fall by ever less per step; it holds for a learning
    rate that stays as it is. None below `LEAST` values.
    """
    n = len(curve)
    if n < LEAST:
        return None
    points = [(math.log((i + 0.5) * stride), curve[i]) for i in range(n // 2, n)]
    x = math.fsum(a for a, _ in points) / len(points)
    y = math.fsum(b for _, b in points) / len(points)
    spread = math.fsum((a - x) ** 2 for a, _ in points)
    slope = math.fsum((a - x) * (b - y) for a, b in points) / spread
    rest = [b - y - slope * (a - x) for a, b in points]
    error = math.sqrt(long_run_variance(rest) / spread) * t_quantile(LEVEL, len(points) - 2)
    return max(error - slope, 0.0) * math.log(max(total / (n * stride), 1.0))
