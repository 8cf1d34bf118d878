"""Which samples speak of now, and means and rates over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from upshift.records.resources import Sample

#: Seconds that are called recent: long enough for several batches and looks, short enough to be told in time.
RECENT = 60.0
#: The first seconds of a run say little: libraries load, kernels are chosen, caches fill.
SETTLING = 60.0
#: Fewer samples than that are no evidence.
LEAST_SAMPLES = 4
#: Growth is watched over the last half of the run, at least so long: what start-up takes is no trend.
WATCHED = 300.0


def settled(samples: Sequence[Sample]) -> bool:
    """Whether the start of the run is over, and a recent time after it."""
    return samples[-1].at >= SETTLING + RECENT


def recent(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples of the last minute, at least `LEAST_SAMPLES` where there are so many."""
    since = samples[-1].at - RECENT
    place = len(samples)
    while place > 0 and samples[place - 1].at >= since:
        place -= 1
    return samples[max(min(place, len(samples) - LEAST_SAMPLES), 0) :]


def watched(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The last half of the run, from `WATCHED` seconds on; empty before."""
    end = samples[-1].at
    since = min(end / 2.0, end - WATCHED)
    if since < 0.0:
        return ()
    return [sample for sample in samples if sample.at >= since]


def mean(values: Iterable[float | None]) -> float | None:
    """None without `LEAST_SAMPLES` known values."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if len(known) >= LEAST_SAMPLES else None


def rate(samples: Sequence[Sample], read: Callable[[Sample], float | None]) -> float | None:
    """Growth of a counter per second over these samples."""
    points = [(sample.at, value) for sample in samples if (value := read(sample)) is not None]
    if len(points) < LEAST_SAMPLES or points[-1][0] <= points[0][0]:
        return None
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
