"""The end of a run with a plan: were its steps as fast as when the plan was made?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from upshift.measure.steps import StepRecord
from upshift.records.plan import Pace
from upshift.records.run import Window

#: Windows kept; of more, neighbours are added up two by two.
MOST_WINDOWS = 2048


class Pacing:
    """Keeps the times of the windows of a run; costs nothing where there is no pace to be held against."""

    def __init__(self, pace: dict[str, Any] | None) -> None:
        """
        Args:
            pace: the plan's, as `choosing.Chosen` hands it on.
        """
        # A process among several shares its cores and waits for the others: the plan was timed alone.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self._pace = msgspec.convert(pace, Pace) if pace and alone else None
        self._windows: list[Window] = []
        self._each = 1
        self._open: Window | None = None
        self._taken = 0

    def add(self, record: StepRecord, steps: int) -> None:
        """A window has ended, `steps` steps after the beginning."""
        if self._pace is None or record.nograd or record.checkpoint:
            return
        window = Window(steps - record.steps, record.steps, record.at, record.total)
        self._open = window if self._open is None else _joined(self._open, window)
        self._taken += 1
        if self._taken < self._each:
            return
        self._windows.append(self._open)
        self._open, self._taken = None, 0
        if len(self._windows) >= MOST_WINDOWS:
            pairs = zip(self._windows[::2], self._windows[1::2], strict=True)
            self._windows, self._each = [_joined(a, b) for a, b in pairs], 2 * self._each

    def came_off(self) -> None:
        """Techniques came off: from here on the steps are not the plan's."""
        self._pace = None

    def remark(self, folder: Path) -> str:
        """What is to be said at the end; empty: nothing.

        Args:
            folder: of the run, where what the machine did besides was recorded.
        """
        if self._pace is None:
            return ""
        from upshift.diagnose.pace import sentence, slower
        from upshift.records import resources

        found = slower(self._pace, self._windows)
        if found is None:
            return ""
        seen = resources.read(folder)
        return sentence(found, seen.samples, seen.head) if seen is not None else sentence(found)


def _joined(a: Window, b: Window) -> Window:
    return Window(a.first, a.n + b.n, b.at, a.seconds + b.seconds)
