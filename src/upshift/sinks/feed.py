"""The record of a run as it grows: log and resources, decoded, in the order in which they were written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from upshift.records import resources
from upshift.records.resources import Alarm, Head, Sample
from upshift.records.run import Event, Window
from upshift.records.runlog import LOG
from upshift.sinks.tail import Tail

#: A step count or time beyond these is damage, and no tracker could hold it.
MAX_STEP = 2**53
MAX_SECONDS = 1e9

_LAST_CLOCK = 4e9


class Began(msgspec.Struct, frozen=True):
    """The head of a log. `clock` is in seconds since the epoch."""

    script: str
    arguments: tuple[str, ...] = ()
    started: str = ""
    clock: float | None = None
    plan: str = ""
    techniques: dict[str, dict[str, bool | int | float | str]] = {}
    environment: dict[str, str] = {}


class Ended(msgspec.Struct, frozen=True):
    """The tail of a log; `how` in words."""

    code: int | None = None
    how: str = ""
    seconds: float | None = None


Item = Began | Window | Event | Head | Sample | Alarm | Ended


@dataclass
class Feed:
    """What the record in `folder` has grown by. Of a launch of several processes: that of the first rank."""

    folder: Path
    torn: int = 0
    """Lines that were not understood."""
    more: bool = False
    """Whether there is more to read at once."""
    clock: float | None = None
    """When the run began, in seconds since the epoch."""
    _log: Tail | None = None
    _candidate: Path | None = None
    _resources: Tail = field(init=False)

    def __post_init__(self) -> None:
        self._resources = Tail(self.folder / resources.FILE)

    def read(self, *, last: bool = False) -> list[Item]:
        """The next piece, bounded; `last`: the run is over, so nothing is waited for."""
        log = self._find(settled=last)
        found = [item for raw in (log.read() if log else ()) if (item := self._logged(raw)) is not None]
        self.more = log.more if log else False
        # Samples are placed in time by the start of the run, which the log tells; it may come seconds later.
        if self.clock is not None or last:
            found += [item for raw in self._resources.read() if (item := self._looked(raw)) is not None]
            self.more = self.more or self._resources.more
        return found

    def wall(self, at: float) -> float:
        """Seconds since the epoch of `at` seconds since the run began."""
        return (time.time() if self.clock is None else self.clock) + (at if 0 <= at <= MAX_SECONDS else 0.0)

    def _find(self, *, settled: bool) -> Tail | None:
        if self._log is None:
            found = self.folder / LOG
            if not found.exists():
                found = min(self.folder.glob(f"*/{LOG}"), default=found)
                # Ranks begin at about the same time: the first of them may not be the first that is seen.
                settled = settled or found == self._candidate
                self._candidate = found
                if not settled or not found.exists():
                    return None
            self._log = Tail(found)
        return self._log

    def _logged(self, raw: dict[str, Any]) -> Item | None:
        kind = raw.pop("kind")
        try:
            if kind == "start":
                began = msgspec.convert(raw, Began)
                self.clock = _clock(began)
                return began
            if kind == "steps":
                window = msgspec.convert(raw, Window)
                return window if 0 <= window.first <= MAX_STEP and 0 < window.n <= MAX_STEP else self._tear()
            if kind == "end":
                return msgspec.convert(raw, Ended)
            if kind == "techniques":
                raw = {"text": ", ".join(map(str, raw.get("techniques", {}))) or "none"}
            event = msgspec.convert({"at": 0.0, "text": "", **raw, "kind": kind}, Event)
            return event if event.step is None or 0 <= event.step <= MAX_STEP else self._tear()
        except (msgspec.ValidationError, TypeError):
            return self._tear()

    def _looked(self, raw: dict[str, Any]) -> Item | None:
        kind = raw.pop("kind")
        try:
            if kind == "sample":
                return msgspec.convert(raw, Sample)
            if kind == "head":
                return msgspec.convert(raw, Head)
            if kind == "alarm":
                return msgspec.convert(raw, Alarm)
        except msgspec.ValidationError:
            return self._tear()
        return None

    def _tear(self) -> Item | None:
        self.torn += 1
        return None


def _clock(began: Began) -> float:
    if began.clock is not None and 0 < began.clock < _LAST_CLOCK and math.isfinite(began.clock):
        return began.clock
    try:
        return time.mktime(time.strptime(began.started, "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return time.time()
