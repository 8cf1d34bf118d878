"""Whether a series rises steadily, and how fast: the median slope of all pairs of points with its bounds.

Estimate: Theil 1950, Sen 1968 (JASA 63); bounds from the variance of Kendall's tau. Neighbouring values of memory
depend on each other, for which these bounds are too narrow (a random walk has a "significant" slope more often than
not), so a rise counts only where each third of the time shows it too and a line explains nearly all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

#: Points a series is reduced to (means of neighbours): 1,770 pairs are looked at.
POINTS = 60
#: Fewer points show no trend that could be told from noise.
LEAST_POINTS = 12
#: Correlation with time that a steady rise has at least: a line explains 90 % of the variance.
LEAST_R = 0.95
#: The slope of each third of the time is at least this part of the whole slope, and at most its inverse.
ALIKE = 1.0 / 3.0
#: Two-sided 99 % of the normal distribution.
_Z = 2.576


class Slope(NamedTuple):
    """Per second, with its bounds."""

    value: float
    low: float
    high: float


def rising(points: Sequence[tuple[float, float]]) -> Slope | None:
    """The slope of a series that rises steadily from its first third to its last; None where it does not.

    Args:
        points: (seconds, value) in the order of time.
    """
    points = _reduced(points)
    if len(points) < LEAST_POINTS or points[-1][0] <= points[0][0]:
        return None
    if _correlation(points) < LEAST_R:
        return None
    found = theil_sen(points)
    if found is None or found.low <= 0.0:
        return None
    third = len(points) // 3
    for part in (points[:third], points[third : 2 * third], points[2 * third :]):
        own = _least_squares(part)
        if own is None or not ALIKE <= own / found.value <= 1.0 / ALIKE:
            return None
    # A series that stood still lately (a ramp that has ended) rises no more.
    if all(b[1] <= a[1] for a, b in pairwise(points[-4:])):
        return None
    return found


def theil_sen(points: Sequence[tuple[float, float]]) -> Slope | None:
    """The median of the slopes of all pairs, with 99 % bounds; None without two different times."""
    slopes = sorted(
        (b[1] - a[1]) / (b[0] - a[0]) for place, a in enumerate(points) for b in points[place + 1 :] if b[0] > a[0]
    )
    if not slopes:
        return None
    n, pairs = len(points), len(slopes)
    half = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18.0) / 2.0
    low = slopes[max(math.floor(pairs / 2 - half), 0)]
    high = slopes[min(math.ceil(pairs / 2 + half), pairs - 1)]
    middle = (slopes[(pairs - 1) // 2] + slopes[pairs // 2]) / 2.0
    return Slope(middle, low, high)


def _reduced(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = max(math.ceil(len(points) / POINTS), 1)
    blocks = [points[place : place + size] for place in range(0, len(points), size)]
    return [(fmean(at for at, _ in block), fmean(value for _, value in block)) for block in blocks]


def _moments(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Sums of squares of times and of values about their means, and of their products."""
    t, v = fmean(at for at, _ in points), fmean(value for _, value in points)
    return (
        math.fsum((at - t) ** 2 for at, _ in points),
        math.fsum((value - v) ** 2 for _, value in points),
        math.fsum((at - t) * (value - v) for at, value in points),
    )


def _correlation(points: Sequence[tuple[float, float]]) -> float:
    times, values, products = _moments(points)
    return products / math.sqrt(times * values) if times > 0.0 and values > 0.0 else 0.0


def _least_squares(points: Sequence[tuple[float, float]]) -> float | None:
    times, _, products = _moments(points)
    return products / times if times > 0.0 else None
