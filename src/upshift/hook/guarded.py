"""`run`: the plan applied, guarded and recorded. Cheap: a few microseconds a step."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from upshift.errors import UsageError
from upshift.hook.controller import Controller, describe, exit_code
from upshift.measure.steps import TIMED, StepRecord
from upshift.records.runlog import RunLog
from upshift.sites.runner import ChildSpec
from upshift.units import seconds as in_words

#: A window of the log closes after this many seconds.
WINDOW = 1.0

#: On an accelerator the loss is looked at this many steps late, so that no synchronisation is added.
LATE = 32


class RunController(Controller):
    """Records a run; takes the techniques off when the loss is no longer finite or a technique raises."""

    window = WINDOW

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.quiet = bool(spec.options.get("quiet"))
        self.log = RunLog(Path(spec.record))
        self.began = time.perf_counter()
        self.guarding = bool(spec.plan)
        self.plan = dict(spec.plan)
        self.problem_seen: set[str] = set()
        self.last_loss: float | None = None
        self.late: list[Any] = []
        self.torch: Any = None
        self.steps = 0
        self.flusher: threading.Thread | None = None
        self.log.append(
            "start",
            script=spec.target,
            arguments=list(spec.arguments),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            clock=time.time(),
            pid=os.getpid(),
            plan=str(spec.options.get("plan_file", "")),
            techniques=spec.plan,
            environment=dict(spec.options.get("environment", {})),
        )
        if self.guarding:
            self.on_loss = self._check_loss

    def torch_ready(self, torch: ModuleType) -> None:
        """Say what is patched."""
        self.torch = torch
        # Techniques act in every forward, and the guard looks at every loss.
        self.watch.may_sleep = not self.guarding
        self._event("patched", ", ".join(self.watch.patches.names()))

    def say(self, kind: str, name: str, text: str) -> None:
        """One line a technique, on stderr and in the log."""
        self._event(kind, f"{name}: {text}")
        self._print(f"{kind} {name}: {text}")

    def on_step(self, record: StepRecord) -> None:
        """Write a window of steps to the log."""
        self.steps += record.steps
        losses = [item for item in record.losses if type(item) is float]
        if len(losses) < len(record.losses):
            losses += self._read_late([item for item in record.losses if type(item) is not float])
        if losses:
            self.last_loss = losses[-1]
        self._tell_problems()
        self.log.append(
            "steps",
            first=self.steps - record.steps,
            n=record.steps,
            at=record.at,
            seconds=record.total,
            phases={name: getattr(record, name) for name in TIMED} if record.timed else {},
            loss=_finite(math.fsum(losses) / len(losses)) if losses else None,
            last_loss=_finite(self.last_loss),
            evaluation=record.nograd,
            checkpoint=record.checkpoint,
        )

    def _read_late(self, losses: list[Any]) -> list[float]:
        """Losses of an accelerator, long after they were computed: the last `LATE` wait for the next window."""
        self.late += losses
        ready, self.late = self.late[:-LATE], self.late[-LATE:]
        if not ready:
            return []
        values: list[float] = self.torch.stack([item.float().reshape(()) for item in ready]).tolist()
        if self.guarding and not all(map(math.isfinite, values)):
            self._come_off("the loss is not finite", ())
        return values

    def _check_loss(self, loss: Any) -> bool:
        """Whether this update must be skipped: the loss is not finite while techniques are on."""
        if type(loss) is not float or math.isfinite(loss) or not self.guarding:
            return False
        self._come_off(f"the loss is {loss}", ())
        return True

    def _come_off(self, reason: str, names: tuple[str, ...]) -> None:
        """Take techniques off on the spot and go on as the script was written."""
        for name in names or self.stage.names:
            self.stage.remove(name, reason)
        self.watch.refresh()
        if not self.stage.names:
            self.guarding = False
            self.on_loss = None
            self.watch.on_loss = None
        step = self.watch.index + 1
        self._event("guard", f"step {step}: {reason}; the script's own path goes on")
        self._print(f"guard: step {step}: {reason}; the techniques came off, training goes on without them")

    def rescue(self, module: Any, names: tuple[str, ...], error: Exception) -> None:
        """A technique raised, or the script did inside it: once more without the techniques."""
        self._come_off(describe(error), names)

    def finish(self, error: BaseException | None) -> None:
        """Close the record and say in one line what was seen."""
        elapsed = time.perf_counter() - self.began
        self.watch.flush()
        for name, reason in self.stage.effects().items():
            if reason:
                self._event("no effect", f"{name}: {reason}")
                self._print(f"no effect {name}: {reason}")
        self.log.append("end", code=exit_code(error), how=describe(error), seconds=elapsed, steps=self.steps)
        if isinstance(error, UsageError):
            self.quiet = True  # nothing ran; the error says why
        if self.log.broken:
            self._print(f"the record is incomplete: {self.log.broken}")
        if self.steps:
            self._print(f"{self.steps:,} steps in {in_words(elapsed)}; record: {self.spec.record}")
        else:
            self._print(f"no training step was seen; record: {self.spec.record}")
        self.log.close()

    def _tell_problems(self) -> None:
        for name, text in self.stage.problems().items():
            if name not in self.problem_seen:
                self.problem_seen.add(name)
                self._event("guard", f"{name}: {text}")
                self._print(f"guard: {name}: {text}")

    def _event(self, kind: str, text: str) -> None:
        self.log.append(kind, at=time.perf_counter() - self.began, text=text)

    def _print(self, text: str) -> None:
        if not self.quiet:
            try:
                sys.stderr.write(f"upshift: {text}\n")
                sys.stderr.flush()
            except (OSError, ValueError, AttributeError):
                pass


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
