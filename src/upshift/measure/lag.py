"""Lag: how many more steps the planned arm needs for the same loss.

Both arms run with the same seeds on the same batches. If the planned arm needs (1 + lag) times the steps, its curve
is the stock curve shifted by log(1 + lag) on an axis of log steps, so to first order

    D(t) = planned(t) - stock(t) = lag * s(t),      s(t) = -dL / d log t = -t L'(t),

and lag = mean D / mean s over a window, the last two thirds of the horizon. Mini-batch noise is common to both arms
and cancels in D; what is left of it is averaged out. mean D has a t interval on batch means; mean s comes from a
quadratic in log t fitted to the stock losses but for the first tenth (a linear functional of the coefficients, with
their covariance raised by the correlation of the residuals). Bounds of the ratio are Fieller's (1954), one-sided.

A curve that does not clearly fall cannot show a lag: `flat`. So cannot a curve that has reached its floor near zero
inside the horizon, since all arms are equal there. One pair of runs is one realisation: a slow wander of the planned
arm around the stock arm counts as lag here, which errs on the side of rejecting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from upshift.measure.stats import batch_means, long_run_variance, t_quantile

#: More steps for the same loss that are still called non-inferior.
MARGIN = 0.01
#: One-sided level of the bounds.
LEVEL = 0.99
#: Fewest steps from which anything is said.
LEAST_STEPS = 20
#: A positive loss that has fallen below this share of where it began is at its floor.
FLOOR = 0.02


class LagResult(NamedTuple):
    """Outcome of `lag`. Fractions of the number of steps: 0.01 is one per cent more steps.

    `lag`, `low`, `high`: estimate and one-sided bounds, None where nothing can be said (`reason` says why).
    `smallest`: the smallest lag these steps could have shown: how far `high` lies above the estimate.
    `flat`: the stock curve does not clearly fall, or has reached its floor. Identical losses: it never changes.
    `finite`: all planned losses are finite. `steps`: the horizon compared.
    `excess`, `excess_low`: mean of planned - stock over the window, and its lower bound, as a share of the size of
    the starting loss; what is left to look at where the curve is flat.
    `noise`: spread of the stock loss from batch to batch, as the same share.
    """

    lag: float | None
    low: float | None
    high: float | None
    smallest: float | None
    flat: bool
    finite: bool
    steps: int
    reason: str
    identical: bool = False
    excess: float | None = None
    excess_low: float | None = None
    noise: float | None = None

    @property
    def non_inferior(self) -> bool:
        """Shown to need at most `MARGIN` more steps."""
        return self.finite and self.high is not None and self.high <= MARGIN

    @property
    def inferior(self) -> bool:
        """Shown to need more than `MARGIN` more steps, or not finite at all."""
        return not self.finite or (self.low is not None and self.low > MARGIN)


def _mean_error(values: Sequence[float]) -> tuple[float, int]:
    """Standard error of the mean of a correlated series and its degrees of freedom, from batch means."""
    batches = batch_means(values, most=6)
    return math.sqrt(long_run_variance(batches, lags=1) / len(batches)), len(batches) - 1


class Fall(NamedTuple):
    """-dL/d log t of a window: mean, its standard error and degrees of freedom, and the fitted value per step."""

    mean: float
    error: float
    df: int
    fitted: list[float]


def slope(losses: Sequence[float], first: int, window: int = 0) -> Fall:
    """How fast losses fall on an axis of log steps, from a least-squares quadratic in log t.

    Args:
        losses: of steps `first`, `first` + 1, ... (1-based), at least 6.
        window: index of the loss from which on the slope is wanted; the fit uses all of them.
    """
    n = len(losses)
    axis = [math.log(first + i) for i in range(n)]
    middle = math.fsum(axis) / n
    x = [value - middle for value in axis]
    # An orthogonal basis by hand: 1, x, and p = x^2 freed of both.
    sxx = math.fsum(value * value for value in x)
    skew = math.fsum(value**3 for value in x) / sxx
    p = [value * value - sxx / n - skew * value for value in x]
    spp = math.fsum(value * value for value in p)
    mean = math.fsum(losses) / n
    y = [value - mean for value in losses]
    tilt = math.fsum(map(float.__mul__, x, y)) / sxx
    bend = math.fsum(map(float.__mul__, p, y)) / spp
    rest = [value - tilt * u - bend * v for value, u, v in zip(y, x, p, strict=True)]
    variance = long_run_variance(rest, lags=5) * (n - 1) / (n - 3)
    fitted = [-tilt - bend * (2.0 * u - skew) for u in x[window:]]
    lever = 2.0 * math.fsum(x[window:]) / (n - window) - skew
    error = math.sqrt(variance * (1.0 / sxx + lever * lever / spp))
    return Fall(math.fsum(fitted) / len(fitted), error, n - 3, fitted)


def lag(stock: Sequence[float], planned: Sequence[float], *, level: float = LEVEL) -> LagResult:
    """How many more steps (fraction) the planned arm needs for the same loss, with one-sided bounds at `level`.

    Args:
        stock, planned: loss of each global step from the first step of training on, same seeds and batches. The
            shorter one sets the horizon.

    Returns:
        A `LagResult`; identical losses give 0 with bounds 0, whatever the curve.
    """
    steps = min(len(stock), len(planned))
    stock, planned = [float(v) for v in stock[:steps]], [float(v) for v in planned[:steps]]
    if not all(map(math.isfinite, planned)):
        return LagResult(None, None, None, None, False, False, steps, "the planned losses are not finite")
    if not all(map(math.isfinite, stock)):
        return LagResult(None, None, None, None, False, True, steps, "the stock losses are not finite")
    if steps and stock == planned:
        still = min(stock) == max(stock)
        return LagResult(0.0, 0.0, 0.0, 0.0, still, True, steps, "identical losses", True, 0.0, 0.0)
    if steps < 6:
        return LagResult(None, None, None, None, False, True, steps, f"{steps} steps are too few to compare curves")
    start = max(3, steps // 10)
    # The window is chosen on the stock curve alone: where its last two thirds are flat, all but the first tenth.
    skipped, fall = steps // 3, Fall(0.0, math.inf, 0, [])
    if steps >= LEAST_STEPS:
        for skipped in (steps // 3, start):
            fall = slope(stock[start:], start + 1, skipped - start)
            if fall.mean > t_quantile(0.99, fall.df) * fall.error:
                break
    difference = list(map(float.__sub__, planned[skipped:], stock[skipped:]))
    worse = math.fsum(difference) / len(difference)
    tenth = max(3, steps // 10)
    scale = math.fsum(map(abs, stock[:tenth])) / tenth
    spread, left = _mean_error(difference)
    below = worse - t_quantile(level, left) * spread
    # Half the mean square of successive differences (von Neumann 1941): a trend hardly enters it.
    noise = math.sqrt(math.fsum((b - a) ** 2 for a, b in pairwise(stock[skipped:])) / (2.0 * (len(difference) - 1)))
    seen = (worse / scale, below / scale, noise / scale) if scale > 0.0 else (None, None, None)

    def untold(reason: str, flat: bool) -> LagResult:
        return LagResult(None, None, None, None, flat, True, steps, reason, False, *seen)

    if steps < LEAST_STEPS:
        return untold(f"{steps} steps are too few to compare curves; {LEAST_STEPS} are needed", False)
    if not fall.mean > t_quantile(0.99, fall.df) * fall.error:
        return untold("the stock loss does not clearly fall within the horizon", True)
    if min(stock) >= 0.0 and median(stock[-2 * tenth :]) < FLOOR * median(stock[:tenth]):
        return untold("the loss reaches its floor within the horizon", True)
    # What the lag itself explains of D is no noise: D - lag * s(t) is.
    ratio = worse / fall.mean
    error, df = _mean_error([d - ratio * s for d, s in zip(difference, fall.fitted, strict=True)])
    # Fieller: the values r with (worse - r * fall)^2 <= (q error)^2 + (r q' fall_error)^2, each with the quantile of
    # its own degrees of freedom. Bounded for g < 1; from a half on the denominator is too vague to divide by.
    quantile, vague = t_quantile(level, df) * error, t_quantile(level, fall.df) * fall.error
    g = (vague / fall.mean) ** 2
    if g > 0.5:
        return untold("the stock loss does not clearly fall within the horizon", True)
    half = math.sqrt((1.0 - g) * quantile**2 + (ratio * vague) ** 2) / fall.mean / (1.0 - g)
    centre = ratio / (1.0 - g)
    high, low = centre + half, centre - half
    return LagResult(ratio, low, high, high - ratio, False, True, steps, "", False, *seen)
