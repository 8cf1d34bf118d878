"""The record of a job's run: the same log as a script's, so that every report reads both."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upshift.measure.inference import InferenceTime
from upshift.records.runlog import RunLog

#: A window of the log closes after this many seconds.
WINDOW = 1.0
#: The count of epochs is written anew when it has grown by this share.
EPOCHS_GROWN = 0.1


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
        self._inference = InferenceTime()
        self._told_epochs = 0.0
        self.epochs: Callable[[], float | None] = lambda: None
        """Passes over the training data so far."""

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
        self._tell_epochs(EPOCHS_GROWN)
        self._first, self._mark = step, now
        self._evaluation = self._checkpoint = 0.0
        losses.clear()

    def _tell_epochs(self, grown: float) -> None:
        made = self.epochs()
        if self.log is not None and made is not None and made > self._told_epochs * (1.0 + grown):
            self._told_epochs = made
            self.log.append("epochs", at=self._at(), text="measured", values={"epochs": made})

    def rewound(self, step: int) -> None:
        """Training goes on from an earlier step; what is open is dropped."""
        self.losses.clear()
        # What saves and evaluations took by now belongs to the next window, but is not part of its steps.
        self._first, self._mark = step, time.perf_counter() - self._evaluation - self._checkpoint

    def evaluated(self, seconds: float, step: int, metrics: dict[str, float], samples: float = 0.0) -> None:
        """An evaluation took so long, over so many samples (0: not known), and found this."""
        self._evaluation += seconds
        self._inference.add(seconds, samples)
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
        self._tell_epochs(0.0)
        if self.log is not None:
            found = self._inference.found
            if found is not None:
                values = {"inference_seconds": found.value}
                self.log.append("model", at=self._at(), text=self._inference.told, values=values)
            self.log.append("end", code=code, how=how, seconds=self._at(), steps=steps)
            if self.log.broken:
                sys.stderr.write(f"upshift: the record is incomplete: {self.log.broken}\n")
            self.log.close()

    def _at(self) -> float:
        return time.perf_counter() - self._began


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
