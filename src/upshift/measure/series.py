"""What a run's log says over time: metrics, losses, the time of a step; and which metric two or more runs share.

A resumed run has several beginnings in one log: its clock starts anew, and its steps go back to the checkpoint. Times
are added up here, and what was done again replaces what it repeats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from upshift.errors import UsageError
from upshift.measure import metrics
from upshift.measure.metrics import Metric
from upshift.measure.printed import is_step_loss
from upshift.measure.stats import detect_warmup
from upshift.records.comparison import Mode, Point
from upshift.records.run import PRINTED, Run

#: Scalars that a script logs, copied beside the run's log.
SCALARS = "scalars.jsonl"
#: Lines of it that are read, and values of one metric that are kept.
MOST_LINES, MOST_POINTS = 2_000_000, 100_000
#: Beyond this a number is damage, not a figure; its square would be no number.
LIMIT = 1e100
#: Share of the steps, at the end, whose mean is the final training loss.
LAST = 0.1
#: The name under which the training loss is compared.
LOSS = "training loss"
#: Keys of a line of scalars that say when, not what.
_WHEN = ("step", "_step", "global_step", "epoch", "_timestamp", "_runtime", "at")


class Choice(NamedTuple):
    """The metric that is compared: what to call it, which way is better, its name in each run, and why this one."""

    name: str
    mode: Mode
    names: tuple[str, ...]
    note: str
    shared: tuple[str, ...]


def _added_up(times: Sequence[float], earlier: Sequence[float]) -> list[float]:
    """Times of a run's starts one after the other; where they go back, the next start began.

    Args:
        earlier: seconds of each start but the last. One that has left no time here was before those that have.
    """
    falls = sum(b < a for a, b in pairwise(times))
    place = len(earlier) - falls
    before, shift, result = 0.0, math.fsum(earlier[: max(place, 0)]), []
    for at in times:
        if at < before:
            # A log that does not say how long a start took: as long as its last line shows.
            shift += earlier[place] if 0 <= place < len(earlier) else before
            place += 1
        result.append(at + shift)
        before = at
    return result


def _latest(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points in the order of their steps: what came later replaces what it goes back behind."""
    kept: list[Point] = []
    for point in points:
        while point.step is not None and kept and kept[-1].step is not None and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return tuple(kept[-MOST_POINTS:])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def events(run: Run) -> dict[str, tuple[Point, ...]]:
    """Metrics in the log: name -> values over steps and seconds. Of two that are called alike, one printed and one
    logged, the logged one counts."""
    found: dict[str, list[Point]] = {}
    kept = [event for event in run.events if event.kind == "metrics"]
    logged = {metrics.words(name) for event in kept if event.text != PRINTED for name in event.values}
    for event, at in zip(kept, _added_up([event.at for event in kept], run.earlier), strict=True):
        for name, value in event.values.items():
            if event.text != PRINTED or metrics.words(name) not in logged:
                found.setdefault(name, []).append(Point(event.step, at, _finite(value)))
    return {name: _latest(points) for name, points in found.items()}


def losses(run: Run) -> tuple[Point, ...]:
    """The mean training loss of every window of the log that read one."""
    times = _added_up([item.at for item in run.windows], run.earlier)
    return _latest(
        Point(item.first + item.n, at, _finite(item.loss))
        for item, at in zip(run.windows, times, strict=True)
        if item.loss is not None
    )


def final_loss(run: Run) -> float | None:
    """Mean training loss over the last tenth of the steps; None where none was read."""
    # Windows of steps that were made again are superseded.
    end, kept = math.inf, []
    for item in reversed(run.windows):
        if item.first + item.n <= end:
            end = item.first
            if item.n > 0 and item.loss is not None and abs(item.loss) < LIMIT:
                kept.append(item)
    if not kept:
        return None
    from_step = (kept[0].first + kept[0].n) * (1 - LAST)
    last = [item for item in kept if item.first + item.n > from_step] or kept[:1]
    return math.fsum((item.loss or 0.0) * item.n for item in last) / sum(item.n for item in last)


def step_seconds(run: Run) -> float | None:
    """Mean time of a training step, warm-up apart (evaluation and checkpoints are not in it); None: not timed."""
    good = [item for item in run.windows if item.n > 0 and 0 < item.seconds < LIMIT]
    kept = good[detect_warmup([item.seconds / item.n for item in good]) :]
    if not kept:
        return None
    return math.fsum(item.seconds for item in kept) / sum(item.n for item in kept)


def phase_seconds(run: Run) -> dict[str, float]:
    """Mean seconds of a step per phase, over the windows that tell it."""
    sums: dict[str, tuple[float, int]] = {}
    for item in run.windows:
        for name, seconds in item.phases.items() if item.n > 0 else ():
            if 0 <= seconds < LIMIT:
                total, steps = sums.get(name, (0.0, 0))
                sums[name] = total + seconds, steps + item.n
    return {name: total / steps for name, (total, steps) in sums.items()}


def scalars(folder: Path) -> dict[str, tuple[Point, ...]]:
    """What the script logged to a tracker, where that was copied beside the log: name -> values in order.

    A line is an object of numbers; `step` (or `global_step`) and `at` (seconds since the run began) are used where
    they are there. Lines that cannot be read are passed over.
    """
    found: dict[str, list[Point]] = {}
    try:
        with open(folder / SCALARS, encoding="utf-8", errors="replace") as file:
            for _, line in zip(range(MOST_LINES), iter(lambda: file.readline(1 << 20), ""), strict=False):
                _scalar(found, line)
    except OSError:
        return {}
    return {name: _latest(points) for name, points in found.items()}


def _scalar(found: dict[str, list[Point]], line: str) -> None:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(item, dict):
        return
    numbers = {str(name): value for name, value in item.items()
               if isinstance(value, (int, float)) and not isinstance(value, bool)}  # fmt: skip
    when = {name: _finite(_float(numbers[name])) for name in _WHEN if name in numbers}
    step = next((when[name] for name in ("step", "_step", "global_step") if name in when), None)
    for name, value in numbers.items():
        points = found.setdefault(name, []) if name not in _WHEN and (name in found or len(found) < 1000) else None
        if points is not None and len(points) < MOST_POINTS:
            points.append(Point(step, when.get("at"), _finite(_float(value))))


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.nan


def choose(runs: Sequence[Mapping[str, Sequence[Point]]], wanted: str | None, losses_known: bool) -> Choice:
    """The metric that all runs are compared by.

    Args:
        runs: of each run its metrics.
        wanted: as the person wrote it, `accuracy:max`; None to choose one that all runs have.
        losses_known: whether the training loss may stand in.

    Raises:
        UsageError: a metric that no run has, that several names fit, or that does not say which way is better.
    """
    shared = tuple(sorted(set.intersection(*map(set, runs)))) if runs else ()
    if wanted is not None:
        return _wanted(runs, Metric.parse(wanted), shared, losses_known)
    # The training loss, where it is known, says more than what was logged or printed of it at single steps.
    ranked = sorted(name for name in shared if metrics.direction(name) is not None
                    and not (losses_known and is_step_loss(name)))  # fmt: skip
    # Of an evaluation before others, its result before what was said on the way, then what is better when higher: a
    # loss says less than what it stands for. The best so far says nothing of the end.
    ranked.sort(key=lambda name: (not metrics.suggestions([name]), bool(metrics.TRAINING & set(metrics.words(name))),
                                  metrics.direction(name) != "max", "best" in metrics.words(name)))  # fmt: skip
    if ranked:
        mode = metrics.direction(ranked[0]) or "max"
        others = f" of {len(shared)} that all runs have ({', '.join(shared[:8])}); name another with --metric"
        note = f"{ranked[0]!r} was chosen{others if len(shared) > 1 else ': all runs have it'}"
        return Choice(ranked[0], mode, (ranked[0],) * len(runs), note, shared)
    any_at_all = sorted({name for run in runs for name in run})
    if shared:
        why = f"no metric was named, and {', '.join(shared[:8])} do not tell which way is better"
    elif any_at_all:
        why = f"no metric is in all runs (seen: {', '.join(any_at_all[:8])})"
    else:
        why = "no metric is in the records"
    if losses_known:
        return Choice(LOSS, "min", ("",) * len(runs), f"{why}: the training loss stands in for one", shared)
    return Choice(
        "", "min", ("",) * len(runs), f"{why}, and no loss either: only what the runs took is compared", shared
    )


def _wanted(
    runs: Sequence[Mapping[str, Sequence[Point]]], metric: Metric, shared: tuple[str, ...], losses_known: bool
) -> Choice:
    names = []
    for run in runs:
        fitting = [name for name in run if metric.fits(name)]
        best = min(map(metric.rank, fitting), default=0)
        fitting = [name for name in fitting if metric.rank(name) == best]
        if len(fitting) > 1:
            exact = [name for name in fitting if metrics.words(name) == metrics.words(metric.name)]
            if len(exact) != 1:
                raise UsageError(
                    f"several numbers are called {metric.name!r}: {', '.join(map(repr, sorted(fitting)))}.",
                    remedy="Name one of them in full.",
                )
            fitting = exact
        names.append(fitting[0] if fitting else "")
    if not any(names):
        if "loss" in metrics.words(metric.name) and losses_known:
            return Choice(LOSS, "min", ("",) * len(runs), "the loss of the training steps", shared)
        seen = sorted({name for run in runs for name in run})
        told = f"Seen are {', '.join(map(repr, seen[:8]))}." if seen else "No metric is in these records."
        raise UsageError(f"no run has a metric {metric.name!r}.", remedy=told)
    missing = sum(not name for name in names)
    found = ", ".join(repr(name) for name in dict.fromkeys(name for name in names if name))
    note = f"found as {found}" + (f"; {missing} of {len(runs)} runs do not have it" if missing else "")
    return Choice(metric.name, metric.mode, tuple(names), note, shared)
