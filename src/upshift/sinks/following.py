"""From the record of a run to what trackers hold: named numbers at a step and a time, and a few texts.

Names: `train/loss`, `train/steps_per_second`, `phase/NAME` (seconds per step), `pause/evaluation` and
`pause/checkpoint` (seconds in which training stood still), `metric/NAME` as the run calls it, `resource/NAME`,
`resource/gpuN/NAME`.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from upshift.records.resources import Alarm, Head, Sample
from upshift.records.run import Event, Window
from upshift.sinks.feed import Began, Ended, Feed

LOSS = "train/loss"
RATE = "train/steps_per_second"
METRIC = "metric/"
RESOURCE = "resource/"

#: Written into the run's folder at its end.
REPORT = "report.html"

#: Seconds that closing may take to send what is left.
LAST_LOOK = 20.0

#: Checkpoints named at the end; the newest of more.
MOST_CHECKPOINTS = 100

_SECRET = re.compile(r"(?i)(key|token|secret|passw|credential|auth)")


@dataclass(frozen=True)
class Point:
    """Numbers seen at one moment: after `step` updates, at `wall` seconds since the epoch. All are finite."""

    step: int
    wall: float
    values: dict[str, float]


@dataclass(frozen=True)
class Note:
    """A line of text at one moment."""

    step: int
    wall: float
    kind: str
    text: str


@dataclass(frozen=True)
class Closing:
    """What is told at the end. `ended` is None where the log has no end: killed, or still running."""

    ended: Ended | None
    step: int
    wall: float
    report: Path | None
    checkpoints: tuple[Path, ...]


class Tracker(Protocol):
    """What a tracker takes. Whatever it raises ends it, and only it."""

    def begin(self, began: Began, folder: Path) -> None:
        """Called once, before everything else."""

    def add(self, points: Sequence[Point], notes: Sequence[Note]) -> None:
        """In the order of the record; points before notes."""

    def end(self, closing: Closing) -> None:
        """Called once, if `begin` was."""


class Follow:
    """A sink: tails the record in a folder and hands it to a tracker."""

    def __init__(self, name: str, tracker: Tracker, folder: Path) -> None:
        self.name = name
        self.opened = False
        self._tracker = tracker
        self._feed = Feed(folder)
        self._names = Names(self._feed)
        self._began = False
        self._ended: Ended | None = None
        self._over = False

    def poll(self) -> None:
        """Hand over what is new: one bounded piece. What the tracker raises is raised once, then nothing is done."""
        self._take(last=False)

    def close(self) -> None:
        """Hand over what is left, for `LAST_LOOK` seconds at most, and the report."""
        deadline = time.monotonic() + LAST_LOOK
        while not self._over:
            self._take(last=True)
            if not self._feed.more or time.monotonic() > deadline:
                break
        if not self._began or self._over:
            return
        self._over = True
        folder, names, ended = self._feed.folder, self._names, self._ended
        if ended is not None and ended.seconds is not None:
            names.moment(ended.seconds)
        self._tracker.end(Closing(ended, names.step, names.latest, write_report(folder), checkpoints(folder)))

    def _take(self, *, last: bool) -> None:
        if self._over:
            return
        points: list[Point] = []
        notes: list[Note] = []
        try:
            for item in self._feed.read(last=last):
                if isinstance(item, Began):
                    self._ended = None
                    if self._began:
                        notes.append(Note(self._names.step, self._feed.wall(0.0), "start", "started again"))
                    else:
                        self._began = True
                        self._tracker.begin(_discreet(item), self._feed.folder)
                        self.opened = True
                elif isinstance(item, Ended):
                    self._ended = item
                elif isinstance(item, (Alarm, Event)):
                    if isinstance(item, Event) and (point := self._names.metrics(item)):
                        points.append(point)
                    elif item.text:
                        notes.append(self._names.note(item))
                elif not isinstance(item, Head) and (point := self._names.point(item)):
                    points.append(point)
                elif isinstance(item, Head):
                    self._names.cores = item.cores
            # Without a head nothing is known of the run yet; what comes before it cannot be placed.
            if self._began and (points or notes):
                self._tracker.add(points, notes)
        except BaseException:
            self._over = True
            raise


class Names:
    """Gives the numbers of the record their names, and the moment they belong to."""

    def __init__(self, feed: Feed) -> None:
        self.step = 0
        self.latest = 0.0
        """The time of the newest thing seen."""
        self.cores: float | None = None
        self._feed = feed
        self._before: Sample | None = None

    def point(self, item: Window | Sample) -> Point | None:
        """The numbers of a window of steps, or of a look at the machine; None where there are none."""
        if isinstance(item, Window):
            self.step = item.first + item.n
            values = _window(item)
        else:
            values = _sample(item, self._before, self.cores)
            self._before = item
        return self._made(self.step, item.at, values)

    def metrics(self, item: Event) -> Point | None:
        """The metrics of an evaluation; None where the event has none."""
        values = {f"{METRIC}{name}": value for name, value in item.values.items()}
        return self._made(self.step if item.step is None else item.step, item.at, values)

    def note(self, item: Event | Alarm) -> Note:
        """The text of an event or an alarm."""
        kind = item.kind if isinstance(item, Event) else f"alarm {item.name}"
        step = item.step if isinstance(item, Event) and item.step is not None else self.step
        return Note(step, self.moment(item.at), kind, item.text)

    def moment(self, at: float) -> float:
        """Seconds since the epoch, of `at` seconds since the run began."""
        wall = self._feed.wall(at)
        self.latest = max(self.latest, wall)
        return wall

    def _made(self, step: int, at: float, values: dict[str, float | None]) -> Point | None:
        wall = self.moment(at)
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        return Point(step, wall, known) if known else None


def _window(item: Window) -> dict[str, float | None]:
    found: dict[str, float | None] = {LOSS: item.loss}
    if item.seconds > 0:
        found[RATE] = item.n / item.seconds
    for name, seconds in item.phases.items():
        found[f"phase/{name}"] = seconds / item.n
    if item.evaluation:
        found["pause/evaluation"] = item.evaluation
    if item.checkpoint:
        found["pause/checkpoint"] = item.checkpoint
    return found


def _sample(item: Sample, before: Sample | None, cores: float | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "memory_bytes": item.memory,
        "memory_available_bytes": item.memory_available,
        "shm_bytes": item.shm,
        "disk_free_bytes": item.disk_free,
        "processes": item.processes,
        "threads": item.threads,
        "clock_hertz": item.clock,
        "temperature_celsius": item.temperature,
        "watts": item.watts,
        "joules": item.joules,
    }
    if before is not None and item.at > before.at:
        for name, now, then in (
            ("cpu_cores_busy", item.cpu_seconds, before.cpu_seconds),
            ("disk_read_bytes_per_second", item.read, before.read),
            ("disk_written_bytes_per_second", item.written, before.written),
            ("network_sent_bytes_per_second", item.sent, before.sent),
            ("network_received_bytes_per_second", item.received, before.received),
        ):
            if now is not None and then is not None:
                found[name] = (now - then) / (item.at - before.at)
        busy = found.get("cpu_cores_busy")
        if busy is not None and cores:
            found["cpu_utilisation"] = busy / cores
    for index, gpu in enumerate(item.gpus):
        for name, value in (
            ("utilisation", gpu.utilisation),
            ("memory_bytes", gpu.memory),
            ("watts", gpu.watts),
            ("temperature_celsius", gpu.temperature),
            ("clock_hertz", gpu.clock),
        ):
            found[f"gpu{index}/{name}"] = value
    return {RESOURCE + name: value for name, value in found.items()}


def _discreet(began: Began) -> Began:
    """The head without what looks like a password: trackers are read by others than the log is."""
    from msgspec.structs import replace

    return replace(began, arguments=tuple(without_secrets(began.arguments)))


def without_secrets(arguments: Iterable[str]) -> list[str]:
    """Arguments with the values of options such as `--api-key` left out."""
    found: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide and not argument.startswith("-"):
            found.append("***")
        elif equals and _SECRET.search(name):
            found.append(f"{name}=***")
        else:
            found.append(argument)
        hide = not equals and argument.startswith("-") and bool(_SECRET.search(argument))
    return found


def write_report(folder: Path) -> Path | None:
    """The page of the run, written whole into its folder; None where there is nothing to draw or no room."""
    from upshift.errors import UpshiftError
    from upshift.records import resources
    from upshift.records.runfold import fold
    from upshift.report.html import render_run

    temporary = folder / f".{REPORT}.{os.getpid()}"
    try:
        temporary.write_text(render_run(fold(folder), resources=resources.read(folder)), "utf-8")
        temporary.replace(folder / REPORT)
    except (OSError, UpshiftError, ValueError):
        temporary.unlink(missing_ok=True)
        return None
    return folder / REPORT


def checkpoints(folder: Path) -> tuple[Path, ...]:
    """Whole checkpoints of a run, in the order of their steps. Scripts keep theirs elsewhere: those are not seen."""
    from upshift.checkpoint.manifest import MANIFEST

    try:
        found = [path.parent for path in (folder / "checkpoints").glob(f"step-*/{MANIFEST}")]
    except OSError:
        return ()
    return tuple(sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])[-MOST_CHECKPOINTS:])
