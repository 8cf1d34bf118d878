"""Wilcoxon's signed-rank bounds: what can be said of the middle of a few values without knowing their distribution.

Student's t believes in values that happen to agree: where the noise is a stall of always the same length, five quads
with the stall on the same side look like a gain without scatter. The sign of a quad is drawn at random, so under
identical arms every pattern of signs is equally likely, and the rank bounds hold whatever the noise looks like.

Sources: Wilcoxon (1945), Biometrics Bulletin 1(6); Hollander, Wolfe and Chicken (2014), "Nonparametric Statistical
Methods", section 3.3 (bounds from Walsh averages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

#: From so many values on, the mean of what is not trimmed is normal enough.
ENOUGH = 60


@lru_cache(maxsize=64)
def _counts(n: int) -> tuple[int, ...]:
    """How many of the 2^n patterns of signs give each sum of positive ranks, 0 .. n (n + 1) / 2."""
    counts = [1]
    for rank in range(1, n + 1):
        longer = counts + [0] * rank
        for at, value in enumerate(counts):
            longer[at + rank] += value
        counts = longer
    return tuple(counts)


def left_out(n: int, tail: float) -> int | None:
    """How many of the smallest Walsh averages may be left out so that the next is a one-sided bound at `tail`.

    None: `n` values are too few for any bound at this level (2^-n > tail).
    """
    allowed = tail * 2.0**n
    seen = 0
    for at, count in enumerate(_counts(n)):
        seen += count
        if seen > allowed:
            return at - 1 if at else None
    return len(_counts(n)) - 1


def bounds(values: Sequence[float], tail: float) -> tuple[float, float]:
    """One-sided bounds of the middle of symmetrically distributed values, each wrong with probability `tail` at most.

    Infinite where the values are too few. The k-th smallest of the averages of all pairs (a value with itself
    included) is the bound, exact for every symmetric distribution.

    Raises:
        ValueError: more than `ENOUGH` values, or none.
    """
    n = len(values)
    if not 0 < n <= ENOUGH:
        raise ValueError(f"need 1 to {ENOUGH} values, got {n}")
    skip = left_out(n, tail)
    if skip is None:
        return -math.inf, math.inf
    averages = sorted((values[i] + values[j]) / 2.0 for i in range(n) for j in range(i, n))
    skip = min(skip, (len(averages) - 1) // 2)
    return averages[skip], averages[-1 - skip]
