"""Whole runs over seeds: paired differences of a metric, and ratios of times, with Student's t intervals.

Non-inferiority: the plan is as good when the one-sided lower bound of (plan - stock), signed so that more is better,
lies above minus the margin (Piaggio et al. 2012, "Reporting of noninferiority and equivalence randomized trials").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from upshift.measure.stats import t_quantile
from upshift.records.verification import Answer, Interval

#: Seeds beyond which nobody is told to go.
MOST_SEEDS = 100


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean with one-sided bounds; without bounds for fewer than two values, unknown for none."""
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0, level)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1, level)
    reach = t_quantile(level, n - 1) * spread(values) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach, n, level)


def spread(values: Sequence[float]) -> float:
    """Standard deviation (n - 1) of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def ratio(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Geometric mean of a / b over pairs, with bounds; times must be positive."""
    found = interval([math.log(x / y) for x, y in zip(a, b, strict=True)], level)
    mean, low, high = (None if value is None else math.exp(value) for value in (found.mean, found.low, found.high))
    return Interval(mean, low, high, found.n, level)


def judge(differences: Sequence[float], margin: float, level: float = 0.95) -> tuple[Answer, str]:
    """Whether the plan is as good, and why (in words).

    Args:
        differences: plan minus stock, one per seed, signed so that more is better.
        margin: the loss that is still called as good, more than 0, in the metric's unit.
    """
    n = len(differences)
    found = interval(differences, level)
    if found.mean is None or found.low is None or found.high is None:
        return "not shown", f"{n} pairs of runs are too few for an interval"
    most = max(0.0, -found.low)
    bound = f"at {level:.0%} the plan loses at most {most:.4g}, {margin:.4g} are allowed"
    if found.low > -margin:
        return "as good", bound
    if found.high < -margin:
        return "worse", f"the plan loses {-found.mean:.4g} (at least {-found.high:.4g}), {margin:.4g} were allowed"
    needed = seeds_needed(differences, margin, level)
    more = f"about {needed} seeds would show a plan that is as good" if needed else "more seeds would hardly show more"
    return "not shown", f"at {level:.0%} the plan may lose {most:.4g}, {margin:.4g} are allowed: {more}"


def seeds_needed(differences: Sequence[float], margin: float, level: float = 0.95) -> int | None:
    """Seeds with which a plan without any loss would be shown as good in half the cases; None beyond `MOST_SEEDS`."""
    scatter = spread(differences)
    for n in range(3, MOST_SEEDS + 1):
        if t_quantile(level, n - 1) * scatter / math.sqrt(n) < margin:
            return n
    return None
