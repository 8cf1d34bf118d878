"""Work done twice: what interruptions cost a run, as its log shows it, or as is to be expected on a spot machine.

Expected of one interruption: half the time between two saves, and the time to start anew (Young, "A first order
approximation to the optimum checkpoint interval", CACM 17, 1974; Daly, FGCS 22, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from upshift.measure.totals import entry
from upshift.records.ledger import Entry
from upshift.records.quantity import unknown
from upshift.records.run import Run, Window
from upshift.units import seconds as in_words


@dataclass(frozen=True)
class Spot:
    """A machine that may be taken away, once in `between` seconds on average.

    `save_every`: seconds from one save to the next; `restart`: from an interruption to the next update. None: as the
    run's own log shows them.
    """

    between: float
    save_every: float | None = None
    restart: float | None = None


def expected(seconds: float, between: float, save_every: float, restart: float) -> float:
    """Seconds lost in `seconds` of a run: seconds / between x (save_every / 2 + restart), to first order.

    Raises:
        ValueError: a negative or infinite time, or no time between interruptions.
    """
    times = (seconds, between, save_every, restart)
    if not all(math.isfinite(value) and value >= 0.0 for value in times) or between == 0.0:
        raise ValueError(f"{times}: seconds, not negative, and some between interruptions")
    return seconds / between * (save_every / 2.0 + restart)


def lost(run: Run, seconds: float | None, spot: Spot | None = None) -> Entry:
    """Seconds of the run that were spent on work done again and on starting anew; else those to be expected."""
    again, anew = done_again(run.windows), sum(_startups(run.windows)[1:])
    if again > 0.0 or run.earlier:
        if not run.windows:
            return Entry(unknown("s"), f"{len(run.earlier) + 1} starts, and the log holds no steps")
        starts = f" in {len(run.earlier) + 1} starts" if run.earlier else ", back to an earlier state"
        how = f"by the log: {in_words(again)} of steps done again and {in_words(anew)} to start anew{starts}"
        return entry(again + anew, "s", how, n=len(run.earlier))
    if spot is not None:
        return _expected(run, seconds, spot)
    if not run.windows:
        return Entry(unknown("s"), "the log holds no steps")
    return entry(0.0, "s", "by the log: one start, and no step was done twice", n=1)


def _expected(run: Run, seconds: float | None, spot: Spot) -> Entry:
    saves = sum(window.checkpoint > 0.0 for window in run.windows)
    every = spot.save_every
    if every is None and seconds is not None and saves:
        every = seconds / saves
    startups = _startups(run.windows)
    restart = spot.restart if spot.restart is not None else startups[0] if startups else None
    if seconds is None or restart is None:
        return Entry(unknown("s"), "the log does not say how long the run or its start took")
    # Without a save everything is lost: half the run on average.
    between = f"{in_words(every)} between saves" if every is not None else "run, which saved nothing,"
    every = seconds if every is None else every
    try:
        value = expected(seconds, spot.between, every, restart)
    except ValueError:
        return Entry(unknown("s"), "the times between interruptions or saves are no times")
    how = (
        f"one interruption expected in {in_words(spot.between)}; each costs half of the {between} "
        f"and {in_words(restart)} to start anew"
    )
    return entry(value, "s", how, basis="estimated")


def done_again(windows: Sequence[Window]) -> float:
    """Seconds of steps that were made once more: where a window begins before the one ahead of it ended.

    What was lost after the last window of a start is not in the log, so it is a lower bound.
    """
    total, end = 0.0, 0
    kept: list[tuple[int, float]] = []
    for window in windows:
        back = end - window.first if kept else 0
        while back > 0 and kept:
            n, took = kept.pop()
            if n > back:
                total += took * back / n
                kept.append((n - back, took * (n - back) / n))
            else:
                total += took
            back -= n
        took = window.seconds + window.evaluation + window.checkpoint
        kept.append((max(window.n, 0), took if math.isfinite(took) and took > 0.0 else 0.0))
        end = window.first + max(window.n, 0)
    return total


def _startups(windows: Sequence[Window]) -> list[float]:
    """Seconds before the first update of each start that made one.

    A start is where a window begins before the one ahead of it ended: within one start they follow each other.
    """
    found, ended = list[float](), math.inf
    for window in windows:
        began = window.at - window.seconds - window.evaluation - window.checkpoint
        if began < ended - max(1e-3, 1e-6 * abs(window.at)):
            found.append(max(began, 0.0) if math.isfinite(began) else 0.0)
        ended = window.at
    return found
