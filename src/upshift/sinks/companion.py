"""What the companion of a run does: look, write, warn, until the process it watches is gone.

Whatever fails here is a line in `beside.log`, never more. Looks become rarer as the run grows older and as they cost
more, so that their cost stays a small share of one core and the record a few megabytes.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from upshift.measure.resources import Looker
from upshift.records.plan import Pace
from upshift.records.resources import FILE, Head, Sample
from upshift.records.run import Window
from upshift.records.runlog import LOG
from upshift.sinks.beside import Spec, born
from upshift.sinks.tail import Tail
from upshift.sinks.threads import Trackers

#: A period is at least this part of the time since the run began, up to `RAREST` seconds.
PART, RAREST = 1.0 / 600.0, 30.0
#: Looking takes at most this share of the time of one core; beyond it, looks become rarer without bound.
SHARE = 0.0025
#: Seconds between two checks for alarms, and samples they are told of: enough for the last half of a day.
ALARM_EVERY, MOST_SAMPLES = 15.0, 1200
MOST_WINDOWS = 4000
#: Events of a log after which its steps are not those of its plan.
CAME_OFF = ("off", "failed", "guard")
#: Reads of the log at one check; each is bounded.
READS = 4
#: Failures in a row after which looking is given up.
PATIENCE = 20
LOG_FILE, MOST_LINES = "beside.log", 1000


class Companion:
    """One run's companion. `watch` returns when the run is over."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._folder = Path(spec.folder)
        self._process = Watched(spec.pid, spec.born)
        self._lines = Lines(self._folder / FILE)
        self._pace = msgspec.convert(spec.pace, Pace) if spec.pace else None
        self._said = 0
        self._looker: Looker | None = None
        self._head: Head | None = None
        self._samples: list[Sample] = []
        self._raised: set[str] = set()
        self._windows = Windows(self._folder)
        self._costs: deque[float] = deque(maxlen=5)
        self._checked = 0.0
        self._looks = 0
        self._stop = False

    def watch(self) -> None:
        """Look until the process is gone, the folder is removed, or somebody asks this one to end."""
        signal.signal(signal.SIGTERM, self._end)
        trackers = Trackers(self._spec.sinks, self._folder, self._say)
        failures = 0
        while failures < PATIENCE and not self._stop:
            began = time.thread_time()
            failures = 0 if self._look() else failures + 1
            self._looks += 1
            trackers.check()
            if self._looks > 1:  # the first one imports and opens things
                self._costs.append(time.thread_time() - began)
            if self._process.ended(self._period()) or _removed(self._folder):
                break
        if not _removed(self._folder):
            self._look()
            self._lines.write("end", {"overhead_seconds": round(time.process_time(), 4)})
        trackers.close()

    def _end(self, *_: object) -> None:
        self._stop = True
        self._process.hurry = True

    def _period(self) -> float:
        return next_period(self._spec.period, time.monotonic() - self._spec.began, median(self._costs or [0.0]))

    def _look(self) -> bool:
        spec = self._spec
        try:
            if self._looker is None:
                self._looker = Looker(spec.pid, self._folder, period=spec.period, began=spec.began, spent=spec.spent)
            sample, head = self._looker.look(), self._looker.head()
            if head != self._head:
                self._head = head
                self._lines.write("head", compact(head))
            self._lines.write("sample", compact(sample))
            if sample.processes:
                self._samples = thinned([*self._samples, sample], MOST_SAMPLES)
                self._warn(sample.at, head)
            return True
        except Exception as error:
            self._say(f"a look failed: {type(error).__name__}: {error}")
            return False

    def _warn(self, at: float, head: Head) -> None:
        if at - self._checked < ALARM_EVERY:
            return
        self._checked = at
        # Short runs end before the first check.
        from upshift.diagnose import pace
        from upshift.diagnose.alarms import alarms

        windows = self._windows.read()
        found = alarms(self._samples, head, windows)
        slow = pace.alarm(self._pace, windows, self._samples, head) if not self._windows.changed else None
        for alarm in found if slow is None else [*found, slow]:
            if alarm.name not in self._raised:
                self._raised.add(alarm.name)
                self._lines.write("alarm", compact(alarm))

    def _say(self, text: str) -> None:
        """A line in `beside.log`, which nobody but the curious reads."""
        self._said += 1
        if self._said > MOST_LINES:
            return
        try:
            with open(self._folder / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError:
            pass


def next_period(base: float, elapsed: float, cost: float) -> float:
    """Seconds until the next look, where looks cost `cost` seconds of CPU time."""
    return max(base, min(elapsed * PART, RAREST), cost / SHARE)


def thinned(samples: list[Sample], most: int) -> list[Sample]:
    """The same, or where there are more, without every second one of the older half."""
    if len(samples) <= most:
        return samples
    half = len(samples) // 2
    return samples[:half:2] + samples[half:]


def compact(record: msgspec.Struct) -> dict[str, Any]:
    """The fields that say something, with no more digits than they have."""
    found = {}
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        if value is not None and value not in ((), "") and (field.required or value != field.default):
            found[field.name] = _rounded(value)
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value) if abs(value) >= 1e6 else round(value, 4)
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return compact(value) if isinstance(value, msgspec.Struct) else value


def _removed(folder: Path) -> bool:
    try:
        os.stat(folder)
        return False
    except FileNotFoundError:
        return True
    except OSError:
        return False


class Watched:
    """The process a run is. `born` as `beside.born` tells it."""

    def __init__(self, pid: int, since: float | None) -> None:
        self._pid, self._born = pid, since
        self._poll: select.poll | None = None
        self.hurry = False
        """Set by a signal: do not wait."""
        try:
            handle = os.pidfd_open(pid)
        except (OSError, AttributeError):
            return  # gone, or a system without such handles: looked at now and then
        # The handle is that of our process only where the number still was.
        if not self._gone():
            self._poll = select.poll()
            self._poll.register(handle, select.POLLIN)

    def ended(self, seconds: float) -> bool:
        """Wait at most so long for its end; whether it has ended."""
        until = time.monotonic() + seconds
        while not self.hurry:
            left = min(until - time.monotonic(), 1.0)
            if self._gone():
                return True
            if left <= 0.0:
                return False
            if self._poll is None:
                time.sleep(left)
            elif self._poll.poll(left * 1e3):
                return True
        return self._gone()

    def _gone(self) -> bool:
        return self._born is None or born(self._pid) != self._born


class Windows:
    """The windows of the run's log since its last start. Of ranks with folders of their own, the first is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tail: Tail | None = None
        self._found: deque[Window] = deque(maxlen=MOST_WINDOWS)
        self.changed = False
        """Whether techniques came off: the steps are no longer those of the plan."""

    def read(self) -> list[Window]:
        """All so far."""
        if self._tail is None:
            logs = [self._folder / LOG, *sorted(self._folder.glob(f"*/{LOG}"))]
            place = next((log for log in logs if log.exists()), None)
            if place is None:
                return []
            self._tail = Tail(place)
        for _ in range(READS):
            for item in self._tail.read():
                kind = item.pop("kind")
                if kind == "start":
                    self._found.clear()
                    self.changed = False
                elif kind in CAME_OFF:
                    self.changed = True
                elif kind == "steps":
                    try:
                        self._found.append(msgspec.convert(item, Window))
                    except msgspec.ValidationError:
                        continue
            if not self._tail.more:
                break
        return list(self._found)


class Lines:
    """Appends lines to a file, one write each. A disk that is full is tried again with the next line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._torn = False

    def write(self, kind: str, fields: dict[str, Any]) -> None:
        """One line, or none."""
        line = msgspec.json.encode({"kind": kind, **fields}) + b"\n"
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            # After a write cut short the next line starts anew.
            written = os.write(self._fd, b"\n" + line if self._torn else line)
            self._torn = written < len(line)
        except OSError:
            pass
