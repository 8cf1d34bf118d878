"""The simple noise scale of the gradient: how large a batch can be before more samples stop to pay.

Idea: the gradient of a batch of B samples is G + noise, and E |g|^2 = |G|^2 + tr(Sigma) / B. Squared lengths at two
batch sizes give both terms without bias; their ratio, taken after averaging, is the noise scale tr(Sigma) / |G|^2. Well
below that batch, twice the samples a step need nearly half the steps; well above it, nearly as many steps as before.
The two sizes: one step (B), and the mean of k steps at the same weights (k B). Here all is in batches of a step.

What the low end must stand against, since it is what a finding rests on:
    few steps, chance weights   Student's t over windows that share no gradient, at weights some steps apart
    a lucky |G|^2               it is held to be at least the squared mean of one long stretch, which overstates it
    draws without replacement   batches of one epoch pull apart, which hides |G|^2 by tr(Sigma) / (samples); added back
                                where the size of an epoch is known, and outweighed by the long stretch where not
Batches that resemble their neighbours (text read in order) overstate |G|^2 and so understate the scale.

Source: McCandlish, Kaplan, Amodei and the OpenAI Dota Team 2018, "An Empirical Model of Large-Batch Training"
(arXiv:1812.06162), appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from upshift.measure.stats import t_quantile
from upshift.records.quantity import Quantity
from upshift.records.recipe import GradientNoise

#: Windows below which no interval is given.
LEAST_WINDOWS = 5


class Stretch(NamedTuple):
    """Gradients of `steps` batches at the same weights: the mean of their squared lengths, and that of their mean."""

    steps: int
    mean_square: float
    square_of_mean: float


def unbiased(small: float, large: float, small_batch: float, large_batch: float) -> tuple[float, float]:
    """|G|^2 and tr(Sigma), without bias, from mean squared gradient lengths at two batch sizes.

    Args:
        small, large: mean of |g|^2 over batches of `small_batch` and of `large_batch` samples, `large_batch` being the
            larger. Either estimate may be negative by chance: average before dividing one by the other.

    Source: McCandlish et al. 2018, appendix A.1.
    """
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    trace = (small - large) / (1.0 / small_batch - 1.0 / large_batch)
    return signal, trace


def noise_scale(
    windows: Sequence[Stretch], long: Stretch, epoch: float | None = None, level: float = 0.95
) -> GradientNoise:
    """The noise scale in batches of a step, with an interval whose low end errs towards a small scale.

    Args:
        windows: short stretches (two gradients or more each) that share none, each at one set of weights.
        long: a longer stretch at one set of weights near theirs.
        epoch: batches of a step in one pass over the data, where it is drawn without replacement.
        level: of each of the two intervals the ends are made of.
    """
    pairs = [unbiased(item.mean_square, item.square_of_mean, 1.0, item.steps) for item in windows]
    numbers = [value for item in (*windows, long) for value in item[1:]]
    if len(pairs) < LEAST_WINDOWS or not all(map(math.isfinite, numbers)):
        return GradientNoise(why="too few steps with finite gradients")
    hidden = 1.0 / epoch if epoch else 0.0
    signal = _interval([square + trace * hidden for square, trace in pairs], level)
    variance = _interval([trace for _, trace in pairs], level)
    steps = sum(item.steps for item in (*windows, long))
    noise, length = variance.or_else(0.0), signal.or_else(0.0)
    most = max(signal.high or 0.0, long.square_of_mean)
    low = max(variance.low or 0.0, 0.0) / most if most > 0.0 else 0.0
    scale = Quantity(
        value=max(noise, 0.0) / length if length > 0.0 else None,
        unit="batches",
        low=low,
        high=max(variance.high or 0.0, 0.0) / signal.low if signal.low is not None and signal.low > 0.0 else None,
        n=steps,
        level=level,
    )
    return GradientNoise(scale=scale, signal=signal, variance=variance, steps=steps)


def more_samples(factor: float, scale: float) -> float:
    """How many times the samples a batch `factor` times as large needs to get as far.

    Args:
        factor: times the batch; 1 or more.
        scale: the noise scale, in batches as they are now.

    Source: McCandlish et al. 2018, on steps against samples: the samples needed grow as (batch + noise scale).
    """
    return (factor + scale) / (1.0 + scale)


def _interval(values: Sequence[float], level: float) -> Quantity:
    """Mean with a t interval, of values that share no gradient."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(0.5 + level / 2.0, n - 1) * spread / math.sqrt(n)
    return Quantity(value=mean, unit="squared gradient", low=mean - half, high=mean + half, n=n, level=level)
