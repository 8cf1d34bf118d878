"""How long a step of a plan takes when it is confirmed, kept so that later runs can be held against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from upshift.records.plan import Pace

#: Seconds of a stretch: as long as a window of a run's record, so that both hold the same mix of steps (one that begins
#: an epoch, say).
STRETCH = 1.0
#: Fewer stretches show nothing of how much the time of a step varies.
LEAST_STRETCHES = 4
#: The part of the steps at the beginning that is left out: kernels are chosen, caches fill.
SETTLING = 0.25


def pace_of(seconds: Sequence[float], *, from_step: int = 0) -> Pace | None:
    """The pace of steps that took so long, in their order; None where they are too few.

    Args:
        seconds: of each step, in seconds.
        from_step: see `Pace`.
    """
    steady = [value for value in seconds[int(SETTLING * len(seconds)) :] if math.isfinite(value) and value > 0.0]
    if not steady:
        return None
    size = max(math.ceil(STRETCH / median(steady)), 1)
    means = [math.fsum(steady[at : at + size]) / size for at in range(0, len(steady) - size + 1, size)]
    if len(means) < LEAST_STRETCHES:
        return None
    return Pace(median(means), min(means), max(means), len(means), from_step=from_step)
