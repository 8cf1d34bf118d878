"""Intervals for step times: Student's t without scipy, means of correlated series, warm-up, break-even.

Pure Python on lists of floats, cheap enough to run between two training steps. Paired timing is in `paired.py`.

Sources: Hill (1970), CACM Algorithm 396 (t quantiles); Schmeiser (1982), "Batch size effects in the analysis of
simulation output" (batch means, 10 to 30 batches); White (1997), "An effective truncation heuristic for bias
reduction in simulation output" (MSER); Newey and West (1987) (variance of correlated series).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, median

from upshift.records.quantity import Quantity, unknown

_NORMAL = NormalDist()


def normal_quantile(p: float) -> float:
    """The value below which a standard normal variable stays with probability `p` (0 < p < 1)."""
    return _NORMAL.inv_cdf(p)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function (Abramowitz and Stegun 26.5.8), by Lentz' method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        factor = 1.0
        for term in (even, odd):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            factor = c * d
            value *= factor
        if abs(factor - 1.0) < 1e-14:
            break
    return value


def t_tail(t: float, df: float) -> float:
    """P(T > t) for Student's t with `df` degrees of freedom."""
    if t < 0:
        return 1.0 - t_tail(-t, df)
    x, a, b = df / (df + t * t), df / 2.0, 0.5
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 0.5
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return 0.5 * front * _beta_fraction(a, b, x) / a
    return 0.5 * (1.0 - front * _beta_fraction(b, a, 1.0 - x) / b)


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The value below which Student's t with `df` degrees of freedom stays with probability `p`.

    Hill's expansion (CACM 396) polished by Newton steps on the tail.

    Raises:
        ValueError: `p` outside (0, 1) or `df` < 1.
    """
    if not 0.0 < p < 1.0 or df < 1.0:
        raise ValueError(f"need 0 < p < 1 and df >= 1, got p={p!r}, df={df!r}")
    if p < 0.5:
        return -t_quantile(1.0 - p, df)
    tail = 1.0 - p
    if df > 1e6:
        return normal_quantile(p)
    if df < 3.0:
        # The expansion starts at df = 3; below it the closed forms of df = 1 and 2 bracket well enough.
        t = 1.0 / math.tan(math.pi * tail) if df < 1.5 else (1.0 - 2.0 * tail) / math.sqrt(2.0 * tail * (1.0 - tail))
    else:
        a = 1.0 / (df - 0.5)
        b = 48.0 / (a * a)
        c = ((20700.0 * a / b - 98.0) * a - 16.0) * a + 96.36
        d = ((94.5 / (b + c) - 3.0) / b + 1.0) * math.sqrt(a * math.pi / 2.0) * df
        y = (2.0 * d * tail) ** (2.0 / df)
        if y > 0.05 + a:
            x = normal_quantile(p)
            y = x * x
            if df < 5:
                c += 0.3 * (df - 4.5) * (x + 0.6)
            c = (((0.05 * d * x - 5.0) * x - 7.0) * x - 2.0) * x + b + c
            y = (((((0.4 * y + 6.3) * y + 36.0) * y + 94.5) / c - y - 3.0) / b + 1.0) * x
            y = math.expm1(a * y * y)
        else:
            y = (
                (1.0 / (((df + 6.0) / (df * y) - 0.089 * d - 0.822) * (df + 2.0) * 3.0) + 0.5 / (df + 4.0)) * y - 1.0
            ) * (df + 1.0) / (df + 2.0) + 1.0 / y
        t = math.sqrt(df * y)
    log_scale = math.lgamma((df + 1.0) / 2.0) - math.lgamma(df / 2.0) - 0.5 * math.log(df * math.pi)
    for _ in range(8):
        density = math.exp(log_scale - (df + 1.0) / 2.0 * math.log1p(t * t / df))
        if density <= 0.0:
            break
        step = (t_tail(t, df) - tail) / density
        t = max(0.0, t + step)
        if abs(step) <= 1e-10 * max(1.0, t):
            break
    return t


def long_run_variance(values: Sequence[float], lags: int = 3) -> float:
    """Variance of one value times the inflation that correlation of neighbours adds to the variance of the mean.

    The first `lags` autocorrelations with Bartlett weights (Newey and West 1987), each raised by 1/n since short
    series understate them, and never less than the plain variance: negative correlation is not taken as a gift.
    The variance of the mean is this over n.
    """
    n = len(values)
    if n < 2:
        return math.inf
    centre = math.fsum(values) / n
    rest = [value - centre for value in values]
    square = sum(value * value for value in rest)
    if square <= 0.0:
        return 0.0
    inflation = 1.0
    lags = min(lags, n // 4)
    for lag in range(1, lags + 1):
        rho = sum(map(float.__mul__, rest[lag:], rest[:-lag])) / square + 1.0 / n
        inflation += 2.0 * (1.0 - lag / (lags + 1)) * rho
    return square / (n - 1) * max(1.0, inflation)


def batch_means(values: Sequence[float], most: int = 20) -> list[float]:
    """Means of up to `most` consecutive batches of equal length (at least two values each, where n >= 4).

    The oldest values are left out where n is not a multiple.
    """
    n = len(values)
    count = n if n < 4 else min(most, n // 2)
    if count == 0:
        return []
    size = n // count
    start = n - size * count
    return [math.fsum(values[i : i + size]) / size for i in range(start, n, size)]


def mean_interval(values: Sequence[float], level: float = 0.95, unit: str = "s") -> Quantity:
    """Mean with a two-sided t interval on batch means, which allows for the correlation of neighbouring steps.

    Args:
        values: in time order; non-finite ones are left out. `n` counts what was used.

    Returns:
        A measured quantity; without an interval below 4 values, unknown where there is none.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    n = len(finite)
    if n == 0:
        return unknown(unit)
    mean = math.fsum(finite) / n
    if n < 4:
        return Quantity(value=mean, unit=unit, n=n, level=level)
    batches = batch_means(finite)
    count = len(batches)
    error = math.sqrt(long_run_variance(batches, lags=1) / count)
    half = t_quantile(0.5 + level / 2.0, count - 1) * error
    return Quantity(value=mean, unit=unit, low=mean - half, high=mean + half, n=n, level=level)


def narrow_enough(quantity: Quantity, relative: float = 0.02) -> bool:
    """Whether the half-width of the interval is at most `relative` times the value (False where either is unknown)."""
    if quantity.value is None or quantity.low is None or quantity.high is None or quantity.value == 0:
        return False
    return (quantity.high - quantity.low) / 2.0 <= relative * abs(quantity.value)


def detect_warmup(step_seconds: Sequence[float]) -> int:
    """How many first steps to discard as warm-up (compilation, allocator growth, caches); at most half of them.

    MSER (White 1997): the truncation that minimises the squared standard error of the mean of what is left, on
    batches of five from 50 steps on. Steps are capped at three times the median of the later half first, so that
    one stall decides nothing. The cut is then drawn back to the last discarded step that lies outside the band of
    the later half (median +- the larger of 10 % and 4 robust standard deviations): pure noise gives 0.
    """
    n = len(step_seconds)
    if n < 4:
        return 0
    later = step_seconds[n // 2 :]
    middle = median(later)
    spread = 1.4826 * median(abs(value - middle) for value in later)
    band = max(0.1 * abs(middle), 4.0 * spread)
    capped = [min(value, 3.0 * middle) for value in step_seconds] if middle > 0 else list(step_seconds)
    size = 5 if n >= 50 else 1
    count = n // size
    means = [math.fsum(capped[i * size : (i + 1) * size]) / size for i in range(count)]
    total = square = 0.0
    best, best_cut = math.inf, 0
    for cut in range(count - 1, -1, -1):
        total += means[cut] - middle
        square += (means[cut] - middle) ** 2
        left = count - cut
        if cut > count // 2:
            continue
        score = max(0.0, square - total * total / left) / (left * left)
        if score <= best:
            best, best_cut = score, cut
    for index in range(min(best_cut * size, n // 2) - 1, -1, -1):
        if abs(step_seconds[index] - middle) > band:
            return index + 1
    return 0


def break_even_steps(one_off_seconds: float, stock_step: float, planned_step: float) -> float | None:
    """Steps after which a one-off cost is paid back by the faster step; None where it never is.

    Args:
        one_off_seconds: compilation, cache fill, extra warm-up. Zero or less pays at once.
        stock_step, planned_step: seconds per step.
    """
    saved = stock_step - planned_step
    if not saved > 0.0 or not math.isfinite(saved) or not math.isfinite(one_off_seconds):
        return None
    return max(0.0, one_off_seconds) / saved
