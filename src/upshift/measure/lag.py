"""Lag: how many more steps the planned arm needs for the same loss.

Both arms run with the same seeds on the same batches. If the planned arm needs (1 + lag) times the steps, its curve
is the stock curve shifted by log(1 + lag) on an axis of log steps, so to first order

    D(t) = planned(t) - stock(t) = lag * s(t),      s(t) = -dL / d log t = -t L'(t),

and lag = mean D / mean s over a window, the last two thirds of the horizon. Mini-batch noise is common to both arms
and cancels in D; what is left of it is averaged out. mean D has a t interval on batch means; mean s comes from a
quadratic fit of the stock losses on log t (a linear functional of the coefficients, with their covariance raised by
the correlation of the residuals). Bounds of the ratio are Fieller's (1954), one-sided.

A curve that does not clearly fall cannot show a lag: `flat`. So cannot a curve that has reached its floor near zero
inside the horizon, since all arms are equal there. One pair of runs is one realisation: a slow wander of the planned
arm around the stock arm counts as lag here, which errs on the side of rejecting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    `flat`: the stock curve does not clearly fall, or has reached its floor.
    `finite`: all planned losses are finite. `steps`: the horizon compared.
    `excess`, `excess_low`: mean of planned - stock over the window, and its lower bound, as a share of the size of
    the starting loss; what is left to look at where the curve is flat.
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

    @property
    def non_inferior(self) -> bool:
        """Shown to need at most `MARGIN` more steps."""
        return self.finite and self.high is not None and self.high <= MARGIN

    @property
    def inferior(self) -> bool:
        """Shown to need more than `MARGIN` more steps, or not finite at all."""
        return not self.finite or (self.low is not None and self.low > MARGIN)


def _nothing(steps: int, reason: str, *, finite: bool = True) -> LagResult:
    return LagResult(None, None, None, None, False, finite, steps, reason)


def _mean_error(values: Sequence[float]) -> tuple[float, int]:
    """Standard error of the mean of a correlated series and its degrees of freedom, from batch means."""
    batches = batch_means(values, most=8)
    return math.sqrt(long_run_variance(batches, lags=1) / len(batches)), len(batches) - 1


class Fall(NamedTuple):
    """-dL/d log t of a window: mean, its standard error and degrees of freedom, and the fitted value per step."""

    mean: float
    error: float
    df: int
    fitted: list[float]


def slope(losses: Sequence[float], first: int) -> Fall:
    """How fast losses fall on an axis of log steps, from a quadratic fit.

    Least squares; with centred log t the mean slope over the window is the linear coefficient.

    Args:
        losses: of steps `first`, `first` + 1, ... (1-based), at least 6.
    """
    n = len(losses)
    axis = [math.log(first + i) for i in range(n)]
    middle = math.fsum(axis) / n
    x = [value - middle for value in axis]
    # Orthogonalise by hand: 1, x, and x^2 freed of both; then x freed of x^2.
    sxx = math.fsum(value * value for value in x)
    sxxx = math.fsum(value**3 for value in x)
    curve = [value * value - sxx / n - sxxx / sxx * value for value in x]
    scc = math.fsum(value * value for value in curve)
    mean = math.fsum(losses) / n
    y = [value - mean for value in losses]
    bend = math.fsum(map(float.__mul__, curve, y)) / scc
    tilt = math.fsum(map(float.__mul__, x, y)) / sxx - bend * sxxx / sxx
    rest = [value - bend * (u * u - sxx / n) - tilt * u for value, u in zip(y, x, strict=True)]
    variance = long_run_variance(rest, lags=5) * (n - 1) / (n - 3)
    error = math.sqrt(variance * (1.0 / sxx + (sxxx / sxx) ** 2 / scc))
    return Fall(-tilt, error, n - 3, [-tilt - 2.0 * bend * u for u in x])


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
        return _nothing(steps, "the planned losses are not finite", finite=False)
    if not all(map(math.isfinite, stock)):
        return _nothing(steps, "the stock losses are not finite")
    if steps and stock == planned:
        return LagResult(0.0, 0.0, 0.0, 0.0, False, True, steps, "identical losses", True)
    if steps < LEAST_STEPS:
        return _nothing(steps, f"{steps} steps are too few to compare curves; {LEAST_STEPS} are needed")
    # The window is chosen on the stock curve alone: where its last two thirds are flat, from a tenth on.
    for skipped in (steps // 3, max(3, steps // 10)):
        seen = stock[skipped:]
        fall = slope(seen, skipped + 1)
        falls = fall.mean > t_quantile(0.99, fall.df) * fall.error
        if falls:
            break
    difference = list(map(float.__sub__, planned[skipped:], seen))
    worse = math.fsum(difference) / len(difference)
    tenth = max(3, steps // 10)
    scale = math.fsum(map(abs, stock[:tenth])) / tenth
    spread, left = _mean_error(difference)
    share = worse / scale if scale > 0.0 else None
    share_low = (worse - t_quantile(level, left) * spread) / scale if scale > 0.0 else None

    def flat(reason: str) -> LagResult:
        return LagResult(None, None, None, None, True, True, steps, reason, False, share, share_low)

    if not falls:
        return flat("the stock loss does not clearly fall within the horizon")
    if min(stock) >= 0.0 and median(stock[-2 * tenth :]) < FLOOR * median(stock[:tenth]):
        return flat("the loss reaches its floor within the horizon")
    # What the lag itself explains of D is no noise: D - lag * s(t) is.
    ratio = worse / fall.mean
    error, df = _mean_error([d - ratio * s for d, s in zip(difference, fall.fitted, strict=True)])
    quantile = t_quantile(level, df)
    # Fieller: the values r with |worse - r * fall| <= q * sqrt(error^2 + r^2 * fall_error^2). Bounded for g < 1;
    # from a quarter on the denominator is too vague for a ratio to mean much.
    g = (quantile * fall.error / fall.mean) ** 2
    if g > 0.25:
        return flat("the stock loss does not clearly fall within the horizon")
    half = quantile / fall.mean * math.sqrt((1.0 - g) * error**2 + (ratio * fall.error) ** 2) / (1.0 - g)
    centre = ratio / (1.0 - g)
    high, low = centre + half, centre - half
    return LagResult(ratio, low, high, high - ratio, False, True, steps, "", False, share, share_low)
