"""Groups of repeated runs: the middle of a group, and whether two groups differ by more than chance.

A run is the unit of evidence: the steps within one share their seed, their machine and its mood. Groups are small,
so Student's t is used where every value is finite (Welch 1947: unequal scatter; pooled where that is wider), on
logarithms for amounts. Where a value is missing because a run never got there, it counts as worse than any (infinite),
and only ranks are used: the exact distribution of the rank sum under exchange of the labels (Wilcoxon 1945; Mann and
Whitney 1947), and medians with bounds from order statistics. Several tests of one table share their error by Holm's
procedure (1979).

Values that agree by chance look like no scatter at all. So the scatter is taken to be at least half the smallest
step in which the values are told, and a thousandth of an amount.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from upshift.measure.stats import t_quantile, t_tail
from upshift.records.comparison import Scale
from upshift.records.quantity import Basis, Quantity, unknown

#: Relative scatter below which no time, cost or memory is believed to repeat.
FLOOR = 1e-3
#: Of a metric: rounding of the sums it comes from.
ROUNDING = 1e-6
#: Scatter whose square is still a number.
TINY = 1e-150
#: Runs beyond which the exact distribution of ranks is left for its normal limit.
MOST_EXACT = 60


class Gap(NamedTuple):
    """Second group minus first (of logarithms where `scale` is log); None: not known.

    `same` tells tests apart: two figures that are proportional, or rank alike, give one and the same test.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    method: str
    same: tuple[float, ...] = ()


def logs(values: Sequence[float]) -> bool:
    """Whether all values may be compared by their ratios."""
    return all(value > 0 for value in values)


def spread(values: Sequence[float]) -> float:
    """Standard deviation (n - 1) of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def middle(
    values: Sequence[float], unit: str, scale: Scale = "linear", basis: Basis = "measured", level: float = 0.95
) -> Quantity:
    """The mean of a group (`log`: the geometric mean) with a two-sided t interval, without one for a single value.

    Infinite values are those that are worse than any: then the median, with bounds from order statistics where there
    are enough values for any (6 at 95 %). An infinite median or bound is None.

    Args:
        values: one per run, not NaN.
    """
    n = len(values)
    if n == 0 or any(math.isnan(value) for value in values):
        return unknown(unit)
    if not all(map(math.isfinite, values)):
        return _median(values, unit, basis, level)
    log = scale == "log" and logs(values)
    seen = [math.log(value) for value in values] if log else list(values)
    mean = math.fsum(seen) / n
    back = _exp if log else float
    if len(set(values)) == 1:
        same = float(values[0])
        end = same if n > 1 else None
        return Quantity(same, unit, end, end, n, basis, level)
    reach = t_quantile(0.5 + level / 2, n - 1) * spread(seen) / math.sqrt(n)
    low, high = (found if math.isfinite(found) else None for found in (back(mean - reach), back(mean + reach)))
    return Quantity(back(mean), unit, low, high, n, basis, level)


def _median(values: Sequence[float], unit: str, basis: Basis, level: float) -> Quantity:
    ordered = sorted(values)
    n = len(ordered)
    skip = -1
    seen = 0.0
    for k in range(n // 2):
        seen += math.comb(n, k) / 2.0**n
        if 2 * seen > 1 - level:
            break
        skip = k
    ends = (ordered[skip], ordered[n - 1 - skip]) if skip >= 0 else (math.inf, math.inf)
    low, high = (end if math.isfinite(end) else None for end in ends)
    # Two middle values of which one is infinite have no middle.
    value = median(ordered) if math.isfinite(ordered[n // 2]) and math.isfinite(ordered[(n - 1) // 2]) else None
    return Quantity(value, unit, low, high, n, basis if value is not None else "unknown", level)


def resolution(values: Sequence[float]) -> float:
    """The smallest step between two distinct values; 0 where all are the same."""
    ordered = sorted(values)
    most = max(map(abs, ordered), default=0.0)
    gaps = [b - a for a, b in pairwise(ordered) if b - a > 1e-12 * most]
    return min(gaps, default=0.0)


def difference(
    a: Sequence[float], b: Sequence[float], scale: Scale = "linear", level: float = 0.95, *, repeats: bool = False
) -> Gap:
    """How far `b` lies from `a`, with a two-sided interval and p-value.

    Args:
        a, b: one value per run; infinite ones are worse than any. With fewer than two in either group only the
            difference itself is known.
        repeats: a figure that is the same in every run by its nature, as allocated memory: equal values are no chance.
    """
    if not a or not b or any(math.isnan(value) for value in (*a, *b)):
        return Gap(None, None, None, None, "")
    if not all(math.isfinite(value) for value in (*a, *b)):
        return _by_ranks(a, b)
    log = scale == "log" and logs((*a, *b))
    if log:
        a, b = [math.log(value) for value in a], [math.log(value) for value in b]
    value = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    if len(a) < 2 or len(b) < 2:
        return Gap(value, None, None, None, "one run")
    told = 0.0 if repeats else resolution((*a, *b)) / 2
    floor = max(told, FLOOR if log else ROUNDING * max(map(abs, (*a, *b))))
    return _welch(a, b, value, max(floor, TINY), level, "log" if log else "linear")


def _welch(a: Sequence[float], b: Sequence[float], value: float, floor: float, level: float, scale: str) -> Gap:
    (error, df), name = _scatter(a, b, floor, level)
    reach = t_quantile(0.5 + level / 2, df) * error
    p = min(1.0, 2 * t_tail(abs(value) / error, df))
    method = f"{name} on {'logarithms' if scale == 'log' else 'values'}, {df:.1f} degrees of freedom"
    same = (float(f"{value / error:.6g}"), float(f"{df:.6g}"), float(f"{value:.6g}"))
    return Gap(value, value - reach, value + reach, p, method, same)


def _scatter(
    a: Sequence[float], b: Sequence[float], floor: float, level: float
) -> tuple[tuple[float, float], str]:  # fmt: skip
    """Standard error of the difference and its degrees of freedom.

    Welch's approximation calls a little too much different where small groups are of unlike size, so that the pooled
    error, exact for equal scatter, is used where it is the wider. Two runs get the least degrees of freedom: two
    values that agree by chance are too common.
    """
    squares = [max(spread(group), floor) ** 2 for group in (a, b)]
    parts = [square / len(group) for square, group in zip(squares, (a, b), strict=True)]
    # By their sum, so that the squares of very small ones stay above zero.
    shares = [(part / sum(parts)) ** 2 / (len(group) - 1) for part, group in zip(parts, (a, b), strict=True)]
    welch = math.sqrt(sum(parts)), max(1 / sum(shares), 1.0)
    if min(len(a), len(b)) == 2:
        return (welch[0], 1.0), "Welch's t"
    if len(a) == len(b):
        return welch, "Welch's t"
    free = len(a) + len(b) - 2
    total = sum(square * (len(group) - 1) for square, group in zip(squares, (a, b), strict=True))
    pooled = math.sqrt(total / free * (1 / len(a) + 1 / len(b))), float(free)
    wider = max((welch, pooled), key=lambda found: t_quantile(0.5 + level / 2, found[1]) * found[0])
    return wider, "Welch's t" if wider is welch else "Student's t"


def _by_ranks(a: Sequence[float], b: Sequence[float]) -> Gap:
    n, p = len(a) + len(b), rank_p(a, b)
    method = "rank sum, exact" if n <= MOST_EXACT else "rank sum"
    same = tuple(map(float, ranks([*a, *b])))
    return Gap(None, None, None, p if min(len(a), len(b)) > 1 else None, method, same)


def ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value (mean ranks of ties are halves)."""
    ordered = sorted(values)
    first = {value: at for at, value in reversed(list(enumerate(ordered)))}
    last = {value: at for at, value in enumerate(ordered)}
    return [first[value] + last[value] + 2 for value in values]


def rank_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the rank sum of `b`: the share of all ways to pick its runs that lie as far out.

    Exact also with ties up to `MOST_EXACT` runs.
    """
    doubled = ranks([*a, *b])
    n, k = len(doubled), len(b)
    centre = k * sum(doubled) / n
    far = abs(sum(doubled[len(a) :]) - centre)
    if n > MOST_EXACT:
        mean = sum(doubled) / n
        variance = k * (n - k) / (n - 1) * sum((rank - mean) ** 2 for rank in doubled) / n
        return math.erfc(max(far - 1, 0) / math.sqrt(2 * variance)) if variance > 0 else 1.0
    # ways[j][s]: picks of j runs with rank sum s.
    ways: list[dict[int, int]] = [{} for _ in range(k + 1)]
    ways[0][0] = 1
    for rank in doubled:
        for j in range(k - 1, -1, -1):
            for total, count in ways[j].items():
                ways[j + 1][total + rank] = ways[j + 1].get(total + rank, 0) + count
    out = sum(count for total, count in ways[k].items() if abs(total - centre) >= far - 1e-9)
    return out / math.comb(n, k)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that one or more false alarms are as rare as promised for one."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    corrected, most = [1.0] * len(values), 0.0
    for place, at in enumerate(order):
        most = max(most, min(1.0, (len(values) - place) * values[at]))
        corrected[at] = most
    return corrected


def in_turn(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether the runs of two groups took turns, so that a slow drift of the machine did not favour one of them.

    Args:
        a, b: when each run started, as text that sorts by time.

    Returns:
        True where the groups change at least twice in the order of time, and their mean places differ by a quarter
        of the runs at most (half of them where one group came first as a whole).
    """
    if not all((*a, *b)) or len({*a, *b}) < len(a) + len(b):
        return False
    order = sorted([*((start, 0) for start in a), *((start, 1) for start in b)])
    changes = sum(x[1] != y[1] for x, y in pairwise(order))
    places = [[at for at, item in enumerate(order) if item[1] == group] for group in (0, 1)]
    apart = abs(sum(places[0]) / len(a) - sum(places[1]) / len(b))
    return changes >= 2 and apart <= len(order) / 4


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
