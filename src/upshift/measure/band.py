"""The band of a proof: the stock loss of the confirmation in a few windows, and how far other runs may lie from it.

Windows are longer where training is further, so that each is a like share of the steps so far. One confirmation is one
seed. How far another seed lies from it was not measured then; an allowance stands for it, as a standard deviation:

    LAG     of the steps: two seeds reach the same loss at different steps
    FALL    of how far the loss has fallen over the whole band
    LEVEL   of the loss itself

added in squares. The figures were chosen, not derived; `benchmarks/guard_simulation.py` holds them against trainings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from upshift.records.trial import Band

#: Most windows made, and fewest steps in one.
WINDOWS = 24
SHORTEST = 4
#: Fewest steps a band is made of.
LEAST_STEPS = 16
#: Losses around a window from which the spread of single ones is taken.
SPREAD_FROM = 12
#: The allowance for another seed, in standard deviations.
LAG, FALL, LEVEL = 0.15, 0.05, 0.02


def band_of(losses: Sequence[float], skip: int = 0) -> tuple[Band | None, str]:
    """The band of a stock run.

    Args:
        losses: one a step, from the first step of training on.
        skip: first steps that are no ordinary training (dropout was off in them).

    Returns:
        The band and the empty string, or None and why there is none.
    """
    count = len(losses) - skip
    if count < LEAST_STEPS:
        return None, f"{max(count, 0)} steps are too few for a band of the loss"
    if not all(map(math.isfinite, losses)):
        return None, "the stock losses are not finite"
    edges = _edges(skip, len(losses))
    windows = list(pairwise(edges))
    means = [math.fsum(losses[a:b]) / (b - a) for a, b in windows]
    fall = max(means) - min(means)
    between = [
        math.hypot(LAG * slope, FALL * fall, LEVEL * mean)
        for slope, mean in zip(_slopes(windows, means), means, strict=True)
    ]
    return Band(
        first=tuple(a for a, _ in windows),
        length=tuple(b - a for a, b in windows),
        mean=_short(means),
        spread=_short([_spread(losses, a, b, skip) for a, b in windows]),
        between=_short(between),
    ), ""


def _short(values: Sequence[float]) -> tuple[float, ...]:
    """Five digits: a plan is read by people."""
    return tuple(float(f"{value:.5g}") for value in values)


def _edges(start: int, end: int) -> list[int]:
    """Ends of windows that grow with the step: the finest division into at most `WINDOWS`."""
    share = 0.05
    while True:
        edges = [start]
        while edges[-1] < end:
            edges.append(edges[-1] + max(SHORTEST, int(share * edges[-1])))
        # The last window takes in what is left of the next.
        edges[-1] = end
        if len(edges) > 2 and edges[-1] - edges[-2] < SHORTEST:
            del edges[-2]
        if len(edges) - 1 <= WINDOWS:
            return edges
        share *= 1.1


def _slopes(windows: Sequence[tuple[int, int]], means: Sequence[float]) -> list[float]:
    """|dL / d log t| at each window, from the windows around it: what a lag of 1 costs."""
    at = [math.log((a + b + 1) / 2.0) for a, b in windows]
    last = len(windows) - 1
    found = []
    for i in range(len(windows)):
        before, after = max(i - 1, 0), min(i + 1, last)
        found.append(abs(means[after] - means[before]) / (at[after] - at[before]) if after > before else 0.0)
    return found


def _spread(losses: Sequence[float], a: int, b: int, least: int) -> float:
    """Standard deviation of single losses about a straight line through a window of `SPREAD_FROM` steps or more."""
    missing = max(SPREAD_FROM - (b - a), 0)
    a = max(a - (missing + 1) // 2, least)
    return deviation(losses[a : max(b, min(a + SPREAD_FROM, len(losses)))])


def deviation(values: Sequence[float]) -> float:
    """Standard deviation about a straight line; at least 3 values."""
    n = len(values)
    mean, middle = math.fsum(values) / n, (n - 1) / 2.0
    rest = [value - mean for value in values]
    tilt = math.fsum(value * (i - middle) for i, value in enumerate(rest)) / (n * (n * n - 1) / 12.0)
    return math.sqrt(math.fsum((value - tilt * (i - middle)) ** 2 for i, value in enumerate(rest)) / (n - 2))
