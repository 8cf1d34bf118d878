"""The record of a job's run: the same log as a script's, so that every report reads both."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from upshift.records.runlog import RunLog

#: A window of the log closes after this many seconds.
WINDOW = 1.0


class Recorder:
    """Writes windows of steps and events to `<out>/log.jsonl`; without a folder it does nothing."""

    def __init__(self, folder: Path | None, began: float) -> None:
        self.log = RunLog(folder) if folder is not None else None
        self._began = began
        self._first = 0
        self._mark = time.perf_counter()
        self.losses: list[float] = []
        self._evaluation = 0.0
        self._checkpoint = 0.0

    def start(self, *, job: str, arguments: tuple[str, ...], plan_file: str, techniques: dict[str, Any],
              environment: dict[str, str], first: int, planned: int | None = None,
              parameters: int | None = None) -> None:  # fmt: skip
        """The head of the log."""
        self._first = first
        if self.log is not None:
            self.log.append(
                "start", script=job, arguments=list(arguments), started=time.strftime("%Y-%m-%d %H:%M:%S"),
                clock=time.time(), pid=os.getpid(), plan=plan_file, techniques=techniques, environment=environment,
                steps_planned=planned,
            )  # fmt: skip
            if parameters is not None:
                told = f"{parameters:,} parameters are trained"
                self.log.append("model", at=0.0, text=told, values={"parameters": parameters})

    def window(self, step: int) -> None:
        """Close a window: the updates since the last one, up to `step`."""
        losses, n = self.losses, step - self._first
        now = time.perf_counter()
        if self.log is not None and n > 0:
            self.log.append(
                "steps", first=self._first, n=n, at=now - self._began, phases={},
                seconds=now - self._mark - self._evaluation - self._checkpoint,
                loss=_finite(math.fsum(losses) / len(losses)) if losses else None,
                last_loss=_finite(losses[-1]) if losses else None,
                evaluation=self._evaluation, checkpoint=self._checkpoint,
            )  # fmt: skip
        self._first, self._mark = step, now
        self._evaluation = self._checkpoint = 0.0
        losses.clear()

    def rewound(self, step: int) -> None:
        """Training goes on from an earlier step; what is open is dropped."""
        self.losses.clear()
        self._first, self._mark = step, time.perf_counter()

    def evaluated(self, seconds: float, step: int, metrics: dict[str, float]) -> None:
        """An evaluation took so long and found this."""
        self._evaluation += seconds
        told = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        if self.log is not None:
            values = {name: _finite(value) for name, value in metrics.items()}
            self.log.append("metrics", at=self._at(), text=told, step=step, values=values)

    def saved(self, seconds: float) -> None:
        """Saving held training up for so long."""
        self._checkpoint += seconds

    def event(self, kind: str, text: str) -> None:
        """Something worth keeping."""
        if self.log is not None:
            self.log.append(kind, at=self._at(), text=text)

    def end(self, code: int, how: str, steps: int) -> None:
        """The tail of the log."""
        self.window(steps)
        if self.log is not None:
            self.log.append("end", code=code, how=how, seconds=self._at(), steps=steps)
            if self.log.broken:
                sys.stderr.write(f"upshift: the record is incomplete: {self.log.broken}\n")
            self.log.close()

    def _at(self) -> float:
        return time.perf_counter() - self._began


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
