"""From named series of numbers, as trackers keep them, to a `Run`.

A tracker knows moments, not windows: a window is what lies between two moments at which the training loss was logged,
so its seconds hold evaluation and checkpoints, too, unless the series of upshift itself tell the speed.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from upshift.measure.metrics import Metric, suggestions
from upshift.records.run import Event, Run, Window
from upshift.records.runfold import MOST_EVENTS, MOST_WINDOWS
from upshift.sinks.following import METRIC, RATE, RESOURCE

Status = Literal["running", "finished", "failed", "interrupted", "unknown"]

#: Points of one series that are held; of twice as many, every second is dropped.
MOST_POINTS = 1 << 16
#: Names beyond these are left out.
MOST_NAMES = 1000

#: Figures of upshift's own that are no metrics of the training.
_NOT_METRICS = (RESOURCE, "phase/", "pause/")
_MOST_SHOWN = 8
_LOSS = Metric("loss", "min")
#: Training first, then what says nothing, then others; evaluations do not come here.
_RANKS = {3: 0, 1: 1, 4: 2}


@dataclass
class Series:
    """Points of one name in the order in which they were logged."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    walls: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, wall: float, value: float) -> None:
        """A value at a step, at `wall` seconds since the epoch."""
        if len(self.steps) >= 2 * MOST_POINTS:
            self.halve()
        self.steps.append(step)
        self.walls.append(wall)
        self.values.append(value)

    def halve(self) -> None:
        """Drop every second point; the last stays."""
        for name in ("steps", "walls", "values"):
            setattr(self, name, getattr(self, name)[::-1][::2][::-1])

    def points(self) -> Iterator[tuple[int, float, float]]:
        """(step, wall, value)."""
        return zip(self.steps, self.walls, self.values, strict=True)


@dataclass
class Found:
    """What a reader found. `began` and `ended` in seconds since the epoch; None: not told."""

    source: str
    """Of what it is, in words: `TensorBoard event files`."""
    id: str
    script: str
    series: dict[str, Series] = field(default_factory=dict)
    began: float | None = None
    ended: float | None = None
    status: Status = "unknown"
    exit_code: int | None = None
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    torn: int = 0

    def add(self, name: str, step: int, wall: float, value: float) -> None:
        """One number. Steps and times that cannot be are counted as torn."""
        if not (0 <= step < 2**53 and 0 <= wall < 4e9):
            self.torn += 1
            return
        series = self.series.get(name)
        if series is None:
            if len(self.series) >= MOST_NAMES:
                self.torn += 1
                return
            series = self.series[name] = Series()
        series.add(step, wall, value)


def to_run(found: Found) -> Run:
    """The run: windows from the training loss, an event with `values` for every step at which something was logged."""
    first = min((min(series.walls) for series in found.series.values() if series), default=None)
    last = max((max(series.walls) for series in found.series.values() if series), default=None)
    if found.began is not None and first is not None and found.began > first:
        # Sent to the tracker afterwards: its own times are not those of the training.
        found.began = found.ended = None
    began = first if found.began is None else found.began
    ended = last if found.ended is None else found.ended
    name = loss_name(found.series)
    told = f"imported from {found.source}; " + (
        f"the loss is {name!r}, and a window of steps lasts from one logged loss to the next"
        if name
        else "no training loss was found in it"
    )
    windows = _windows(found.series[name], found.series.get(RATE), found.began, began or 0.0) if name else []
    events = _events({key: item for key, item in found.series.items() if key != name}, began or 0.0)
    most = max((max(series.steps) for series in found.series.values() if series), default=0)
    return Run(
        id=found.id,
        script=found.script,
        arguments=found.arguments,
        started=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)) if began is not None else "",
        status=found.status,
        exit_code=found.exit_code,
        seconds=max(ended - began, 0.0) if began is not None and ended is not None else None,
        steps=max(windows[-1].first + windows[-1].n, most) if windows else most,
        windows=tuple(windows),
        events=(Event(at=0.0, kind="imported", text=told), *events),
        environment=found.environment,
        torn_lines=found.torn,
    )


def loss_name(series: dict[str, Series]) -> str:
    """The series that is the training loss; empty where none is. Of several that could be, the longest.

    Words of the name decide, as for `--metric`: `train/loss` before `loss` before `train/loss_epoch`; never one of an
    evaluation.
    """
    fitting = [name for name in series if _LOSS.fits(name) and not suggestions([name]) and len(series[name])]
    return min(fitting, key=lambda name: (_RANKS[_LOSS.rank(name)], -len(series[name]), name), default="")


def _windows(loss: Series, rate: Series | None, told_began: float | None, began: float) -> list[Window]:
    """A window for each logged loss, neighbours merged until there are few enough."""
    rates = dict(zip(rate.steps, rate.values, strict=True)) if rate else {}
    # Some count updates before the step, from 0; a window counts those behind it.
    shift = 1 if min(loss.steps) == 0 else 0
    found: list[Window] = []
    merge = math.ceil(len(loss) / MOST_WINDOWS)
    reached, wall, usual = 0, began, 1
    for index, (step, now, value) in enumerate(loss.points()):
        end = step + shift
        if end <= reached:
            # Gone back to an earlier step; how far before it is not told.
            reached = max(end - usual, 0)
        n = max(end - reached, 1)
        speed = rates.get(step, 0.0)
        told = speed > 0 and math.isfinite(n / speed)
        seconds = n / speed if told else max(now - wall, 0.0)
        if index or told_began is not None or told:
            window = Window(
                first=end - n, n=n, at=max(now - began, 0.0), seconds=seconds, loss=_finite(value),
                last_loss=_finite(value),
            )  # fmt: skip
            if found and index % merge:
                window = _merged(found.pop(), window)
            found.append(window)
        reached, wall, usual = end, now, n
    return found


def _merged(a: Window, b: Window) -> Window:
    n = a.n + b.n
    loss = (a.loss * a.n + b.loss * b.n) / n if a.loss is not None and b.loss is not None else None
    return Window(first=a.first, n=n, at=b.at, seconds=a.seconds + b.seconds, loss=loss, last_loss=b.last_loss)


def _events(series: dict[str, Series], began: float) -> list[Event]:
    kept = {name: item for name, item in series.items() if not name.startswith(_NOT_METRICS) and name != RATE}
    while len(steps := {step for item in kept.values() for step in item.steps}) > MOST_EVENTS and steps:
        max(kept.values(), key=len).halve()
    at: dict[int, float] = {}
    values: dict[int, dict[str, float | None]] = {}
    for name, item in kept.items():
        for step, wall, value in item.points():
            at[step] = max(at.get(step, 0.0), wall - began)
            values.setdefault(step, {})[name.removeprefix(METRIC)] = _finite(value)
    return [
        Event(at=at[step], kind="metrics", text=_text(values[step]), step=step, values=values[step])
        for step in sorted(values)
    ]


def _text(values: dict[str, float | None]) -> str:
    shown = [
        f"{name} {'not finite' if value is None else format(value, '.6g')}"
        for name, value in list(values.items())[:_MOST_SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(values) > _MOST_SHOWN else "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
