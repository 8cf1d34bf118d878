"""Do the steps of a run take longer than when its plan was made? Then the plan may no longer be the best one.

Pure: windows and samples in, words out. A false alarm costs a search for nothing, a missed one only what a plan that
has grown old costs, so three quarters of all windows must lie clearly above everything the plan's own measurement saw.
Steps that became faster are no cause for a word: trials take turns with another process, and a run has no such turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles
from typing import NamedTuple

from upshift.diagnose import lately
from upshift.measure.stats import detect_warmup
from upshift.records.plan import Pace
from upshift.records.resources import Alarm, Head, Sample
from upshift.records.run import Window
from upshift.units import ratio, seconds

NAME = "slower_than_planned"

#: Windows and seconds of steady steps that must have been seen: a neighbour's burst of work is shorter, mostly.
LEAST_WINDOWS, LEAST_SECONDS = 20, 60.0
#: How far above the slowest stretch of the plan's own measurement the lower quartile of the run must lie.
MARGIN = 1.2
#: Share of the cores taken by other programs from which these, not the plan, are named as the reason.
OTHERS = 0.1


class Slower(NamedTuple):
    """Seconds of a step: then, and now (median over windows)."""

    then: float
    now: float


def slower(pace: Pace, windows: Sequence[Window]) -> Slower | None:
    """Whether steps take clearly longer than the plan's did; None where they do not, or too little has been seen.

    Windows with evaluation or checkpoints in them are left out: what stands around those is no steady step.

    Args:
        windows: of one start of the run, in order, the first one first.
    """
    if not windows:
        return None
    first = windows[0].first + pace.from_step
    known = [
        item for item in windows
        if item.n > 0 and item.seconds > 0.0 and item.first >= first and item.evaluation == item.checkpoint == 0.0
    ]  # fmt: skip
    steps = [item.seconds / item.n for item in known]
    cut = detect_warmup(steps)
    if len(known) - cut < LEAST_WINDOWS or sum(item.seconds for item in known[cut:]) < LEAST_SECONDS:
        return None
    low, middle, _ = quantiles(steps[cut:], n=4)
    return Slower(pace.seconds, middle) if low > MARGIN * pace.high else None


def others(samples: Sequence[Sample], head: Head) -> float | None:
    """Cores that other programs kept busy while the run went on; None where that is not known."""
    machine = lately.rate(samples, lambda sample: sample.machine_cpu_seconds)
    own = lately.rate(samples, lambda sample: sample.cpu_seconds)
    return None if machine is None or own is None or not head.cores else max(machine - own, 0.0)


def sentence(found: Slower, samples: Sequence[Sample] = (), head: Head | None = None) -> str:
    """What to say of it: how much slower, and what to do."""
    head = head or Head()
    text = (
        f"steps take {ratio(found.now / found.then)} what they took when this plan was made "
        f"({seconds(found.then)} then, {seconds(found.now)} now, measured)"
    )
    taken = others(samples, head)
    if taken is not None and head.cores and taken >= OTHERS * head.cores:
        return f"{text}: other programs keep {taken:.1f} of {head.cores:g} cores busy; without them the plan may hold"
    return f"{text}: tune again, or see `upshift diagnose`"


def alarm(pace: Pace | None, windows: Sequence[Window], samples: Sequence[Sample], head: Head) -> Alarm | None:
    """The alarm of a run that is followed, at the time of its last sample."""
    found = slower(pace, windows) if pace is not None and samples else None
    return None if found is None else Alarm(samples[-1].at, NAME, sentence(found, samples, head))
