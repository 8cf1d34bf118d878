"""The fold of a run's log into a `Run`: all at once, or again and again while the log grows."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from operator import methodcaller
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from upshift.errors import RecordError
from upshift.records.quantity import Quantity
from upshift.records.run import Event, Run, Window
from upshift.records.runlog import LOG
from upshift.records.tail import Tail
from upshift.records.windows import Reader, added, columns, merged, thin, whole

_NAME_A_RUN = "Name a folder below .upshift/runs."

#: Windows kept in a folded run; longer logs are thinned by merging neighbours.
MOST_WINDOWS = 4096

#: More events than any run has.
MOST_EVENTS = 10_000

#: What those who look at a running run see of its end, whatever was merged or left out.
RECENT_WINDOWS = 600
RECENT_EVENTS = 50

#: Bytes from the head and the tail of a log that show how it stands.
GLIMPSE = 1 << 18

#: Beyond this a count of steps is no count of steps.
_MOST_STEPS = 2**53

#: How a line of steps begins, as `RunLog` writes it.
_STEPS = b'{"kind":"steps",'
_SKIP = len(_STEPS)


class View(NamedTuple):
    """What is known of a run at one moment, for those who look again and again."""

    run: Run
    recent: tuple[Window, ...]
    """The last windows since the run last began, as they were written, never merged."""
    events: tuple[Event, ...]
    """The last events."""
    metrics: Event | None
    """The last evaluation."""
    clock: float | None
    """When the run began, in seconds since the epoch."""
    heard: float | None
    """When the log was last written, in seconds since the epoch."""
    share: float
    """How much of the log is in `run`, 0..1."""


class _Folded:
    """What has been read of a log so far."""

    def __init__(self) -> None:
        self.start: _Start | None = None
        self.end: _End | None = None
        self.windows: list[Window] = []
        self.events: list[Event] = []
        self.recent: deque[Window] = deque(maxlen=RECENT_WINDOWS)
        self.recent_events: deque[Event] = deque(maxlen=RECENT_EVENTS)
        self.metrics: Event | None = None
        self.epochs: Quantity | None = None
        self.last: Window | None = None
        self.earlier: list[float] = []
        self._at = 0.0
        """The last moment this start told of."""
        self.torn = 0
        self._each = 1
        """Windows of the log in a kept one."""
        self._open: list[Window] = []
        self._reader = Reader()

    def lines(self, lines: list[bytes]) -> None:
        """Add lines; those that are not ours are counted."""
        for steps, group in groupby(lines, _IS_STEPS):
            if steps:
                self._steps(list(group))
            else:
                for line in group:
                    self._line(line)

    def _line(self, line: bytes) -> None:
        try:
            item = msgspec.json.decode(line)
            if isinstance(item, dict) and isinstance(item.get("kind"), str):
                self._add(item)
            else:
                self.torn += 1
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.torn += 1

    def _steps(self, lines: list[bytes]) -> None:
        """Nearly all lines of a long log, as `RunLog` writes them: read in one go where all can be."""
        try:
            windows = self._reader.read(b"[{" + b",{".join([line[_SKIP:] for line in lines]) + b"]")
            if len(windows) == len(lines):
                self._windows(windows)
                return
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        for line in lines:
            self._line(line)

    def _add(self, item: dict[str, Any]) -> None:
        kind = item.pop("kind")
        if kind == "start":
            # A job that goes on in the same folder: how it ended before is history.
            start = msgspec.convert(item, _Start)
            if self.start is not None and len(self.earlier) < MOST_EVENTS:
                told = self.end.seconds if self.end is not None else None
                self.earlier.append(self._at if told is None else told)
            self.recent.clear()
            self.start, self.end, self._at = start, None, 0.0
        elif kind == "techniques" and self.start is not None:
            # A run that tuned itself: what stayed on.
            self.start.techniques = msgspec.convert(item.get("techniques"), _Techniques)
        elif kind == "planned" and self.start is not None:
            # How long the run will be, told once that is known.
            self.start.steps_planned = msgspec.convert(item.get("steps"), _Count)
        elif kind == "end":
            self.end = msgspec.convert(item, _End)
        elif kind == "steps":
            self._windows([msgspec.convert(item, Window)])
        else:
            event = msgspec.convert({"at": 0.0, "text": "", **item, "kind": kind}, Event)
            if kind == "epochs":
                self.epochs = _passes(event)
                return
            self.recent_events.append(event)
            self._at = max(self._at, event.at)
            if kind == "metrics" and event.values:
                last = self.metrics
                # One evaluation may be told in several lines.
                same = last is not None and last.step == event.step
                values = {**last.values, **event.values} if last is not None and same else event.values
                self.metrics = msgspec.structs.replace(event, values=values)
                if len(self.events) >= MOST_EVENTS:
                    self.events = _thin_metrics(self.events)
            if len(self.events) < MOST_EVENTS:
                self.events.append(event)

    def _windows(self, windows: Sequence[Window]) -> None:
        fields = columns(windows)
        for counts in fields[:2]:
            if not -_MOST_STEPS < min(counts) <= max(counts) < _MOST_STEPS:
                raise msgspec.ValidationError("more steps than any run makes")
        self.recent.extend(windows[-RECENT_WINDOWS:])
        self.last = whole(windows[-1])
        self._at = max(self._at, max(fields[2]))
        place = 0
        while place < len(windows):
            end = min(place + self._each - len(self._open), len(windows))
            if self._open or end - place < self._each:
                self._open += map(whole, windows[place:end])
                if len(self._open) == self._each:
                    self.windows.append(merged(self._open))
                    self._open = []
            elif self._each == 1:
                self.windows.append(whole(windows[place]))
            else:
                self.windows.append(added(*[column[place:end] for column in fields]))
            place = end
            if len(self.windows) > 2 * MOST_WINDOWS:
                # From here on new windows are merged as widely as the old ones: a run is kept equally fine throughout.
                self.windows, self._each = thin(self.windows), 2 * self._each

    def run(self, name: str) -> Run | None:
        """The run so far; None where the log has no beginning."""
        head, end = self.start, self.end
        if head is None:
            return None
        windows = [*self.windows, merged(self._open)] if self._open else self.windows
        if len(windows) > MOST_WINDOWS:
            windows = thin(windows)
        status: Literal["running", "finished", "failed", "interrupted", "unknown"] = "unknown"
        if end is not None:
            status = "finished" if end.code == 0 else "interrupted" if end.code == 130 else "failed"
        elif _alive(head.pid, head.clock):
            status = "running"
        last = self.last
        at = self.recent[-1].at if self.recent else None
        return Run(
            id=name,
            script=head.script,
            arguments=head.arguments,
            started=head.started,
            status=status,
            exit_code=end.code if end else None,
            seconds=end.seconds if end else at,
            plan=head.plan,
            techniques=head.techniques,
            steps=last.first + last.n if last else 0,
            windows=tuple(windows),
            events=tuple(self.events),
            environment=head.environment,
            guard_fired=any(item.kind == "guard" for item in self.events),
            torn_lines=self.torn,
            steps_planned=head.steps_planned,
            earlier=tuple(self.earlier),
            epochs=self.epochs,
        )


#: A number of steps to come.
_Count = Annotated[int, msgspec.Meta(ge=1, le=_MOST_STEPS)]

_Techniques = dict[str, dict[str, bool | int | float | str]]


class _Start(msgspec.Struct):
    script: str
    arguments: tuple[str, ...]
    started: str
    pid: int = 0
    clock: float | None = None
    plan: str = ""
    techniques: _Techniques = {}
    environment: dict[str, str] = {}
    steps_planned: _Count | None = None


class _End(msgspec.Struct):
    code: int | None = None
    seconds: float | None = None


_IS_STEPS = methodcaller("startswith", _STEPS)


class Incremental:
    """A run that is read while it is written: what has been read stays added up, and only what is new is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tail = Tail(folder / LOG)
        self._found = _Folded()
        self._generation = 0

    def advance(self, seconds: float = math.inf) -> bool:
        """Read what is new, at least a block of it, for about `seconds`; whether all of it was read.

        Raises:
            RecordError: the log is not there (any more).
        """
        until = time.monotonic() + seconds
        while True:
            try:
                lines = self._tail.read()
            except OSError as error:
                raise _unreadable(self.folder, error) from None
            if self._tail.generation != self._generation:
                self._found, self._generation = _Folded(), self._tail.generation
            self._found.lines(lines)
            if self._tail.offset >= self._tail.size:
                return True
            if time.monotonic() >= until:
                return False

    def finish(self) -> None:
        """Take the last line as it is, with or without its end: nothing more will be written."""
        self._found.lines(self._tail.last())

    def run(self) -> Run:
        """The run, as far as it has been read.

        Raises:
            RecordError: the log does not begin like ours.
        """
        run = self._found.run(self.folder.name)
        if run is None:
            raise _unreadable(self.folder)
        return run

    def view(self) -> View:
        """The run and what is new in it, as far as it has been read.

        Raises:
            RecordError: the log does not begin like ours.
        """
        return self._view(self._found, self.run())

    def glimpse(self) -> View:
        """The head and the tail of a long log at once, long before all of it is read; `share` tells how much.

        Raises:
            RecordError: the log is not there, or does not begin like ours.
        """
        found = _Folded()
        try:
            with open(self._tail.path, "rb") as file:
                head = file.read(GLIMPSE)
                start = max(os.fstat(file.fileno()).st_size - GLIMPSE, len(head))
                file.seek(start)
                tail = file.read(GLIMPSE)
        except OSError as error:
            raise _unreadable(self.folder, error) from None
        # Neither the last line of the head nor the first of the tail is whole, but where they meet.
        whole = head + tail if start == len(head) else head[: head.rfind(b"\n") + 1] + tail[tail.find(b"\n") + 1 :]
        found.lines([line for line in whole[: whole.rfind(b"\n") + 1].split(b"\n") if line])
        run = found.run(self.folder.name)
        if run is None:
            raise _unreadable(self.folder)
        return self._view(found, run)

    def _view(self, found: _Folded, run: Run) -> View:
        clock = found.start.clock if found.start is not None else None
        events = tuple(found.recent_events)
        recent, tail = tuple(map(whole, found.recent)), self._tail
        return View(run, recent, events, found.metrics, clock, tail.changed, tail.share)


def fold(folder: Path) -> Run:
    """The run recorded in `folder`. Lines that cannot be read are counted in `torn_lines`.

    Raises:
        RecordError: no log there, or one that does not begin like ours.
    """
    found = Incremental(folder)
    found.advance()
    found.finish()
    return found.run()


def _unreadable(folder: Path, error: OSError | None = None) -> RecordError:
    why = f": {error.strerror}" if error is not None else ""
    return RecordError(f"{folder} holds no readable run{why}.", remedy=_NAME_A_RUN)


def _thin_metrics(events: list[Event]) -> list[Event]:
    """Without every second event of metrics, of each set of names on its own, never the last; all others stay."""
    seen: dict[tuple[str, ...], int] = {}
    kept = []
    for event in reversed(events):
        names = tuple(event.values) if event.kind == "metrics" else ()
        seen[names] = seen.get(names, 0) + 1
        if not names or seen[names] % 2:
            kept.append(event)
    return kept[::-1]


def _passes(event: Event) -> Quantity | None:
    """Epochs so far, as an event tells them."""
    value = event.values.get("epochs")
    if value is None or not 0.0 < value < _MOST_STEPS:
        return None
    return Quantity(value, "epochs", basis="measured" if event.text == "measured" else "estimated")


def _alive(pid: int, clock: float | None) -> bool:
    """Whether the process that began the log at `clock` (seconds since the epoch) still runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        # A process younger than the log has only been given the same number.
        return process.status() != psutil.STATUS_ZOMBIE and (clock is None or process.create_time() <= clock + 1.0)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False
