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

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.quiet = bool(spec.options.get("quiet"))
        self.log = RunLog(Path(spec.record))
        self.began = time.perf_counter()
        self.guarding = bool(spec.plan)
        self.plan = dict(spec.plan)
        self.problem_seen: set[str] = set()
        self.window_from = 0
        self.n = 0
        self.until = 0.0
        self.sums = [0.0] * (len(TIMED) + 3)
        self.loss_sum = 0.0
        self.loss_n = 0
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
        self._event("patched", ", ".join(self.watch.patches.names()))

    def say(self, kind: str, name: str, text: str) -> None:
        """One line a technique, on stderr and in the log."""
        self._event(kind, f"{name}: {text}")
        self._print(f"{kind} {name}: {text}")

    def on_step(self, record: StepRecord) -> None:
        """Add the step to the current window."""
        self.steps += 1
        self.n += 1
        sums = self.sums
        sums[0] += record.total - record.nograd - record.checkpoint
        sums[1] += record.nograd
        sums[2] += record.checkpoint
        sums[3] += record.data
        sums[4] += record.h2d
        sums[5] += record.forward
        sums[6] += record.loss
        sums[7] += record.backward
        sums[8] += record.optimizer
        sums[9] += record.sync
        losses = record.losses
        if losses:
            if type(losses[0]) is float:
                # A mean over micro-batches, or over several networks.
                loss = self.last_loss = losses[0] if len(losses) == 1 else _mean(losses)
                self.loss_sum += loss
                self.loss_n += 1
            else:
                self._read_late(losses[0])
        if record.at >= self.until:
            self.until = record.at + WINDOW
            self._flush(record.at)

    def _read_late(self, loss: Any) -> None:
        """Read losses of an accelerator in batches, long after they were computed."""
        self.late.append(loss)
        if len(self.late) < 2 * LATE:
            return
        values = self.torch.stack([item.float().reshape(()) for item in self.late[:LATE]]).tolist()
        del self.late[:LATE]
        self.last_loss = values[-1]
        self.loss_sum += math.fsum(values)
        self.loss_n += len(values)
        if self.guarding and not all(map(math.isfinite, values)):
            self._come_off("the loss is not finite", ())

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
        self._event("guard", f"step {self.steps + 1}: {reason}; the script's own path goes on")
        self._print(f"guard: step {self.steps + 1}: {reason}; the techniques came off, training goes on without them")

    def rescue(self, module: Any, names: tuple[str, ...], error: Exception) -> None:
        """A technique raised, or the script did inside it: once more without the techniques."""
        self._come_off(describe(error), names)

    def finish(self, error: BaseException | None) -> None:
        """Close the record and say in one line what was seen."""
        elapsed = time.perf_counter() - self.began
        if self.n:
            self._flush(time.perf_counter() - self.watch.born)
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

    def _flush(self, at: float) -> None:
        for name, text in self.stage.problems().items():
            if name not in self.problem_seen:
                self.problem_seen.add(name)
                self._event("guard", f"{name}: {text}")
                self._print(f"guard: {name}: {text}")
        phases = {name: self.sums[3 + i] for i, name in enumerate(TIMED)}
        self.log.append(
            "steps",
            first=self.window_from,
            n=self.n,
            at=at,
            seconds=self.sums[0],
            phases=phases,
            loss=_finite(self.loss_sum / self.loss_n) if self.loss_n else None,
            last_loss=_finite(self.last_loss),
            evaluation=self.sums[1],
            checkpoint=self.sums[2],
        )
        self.window_from += self.n
        self.n = 0
        self.sums = [0.0] * len(self.sums)
        self.loss_sum, self.loss_n = 0.0, 0

    def _event(self, kind: str, text: str) -> None:
        self.log.append(kind, at=time.perf_counter() - self.began, text=text)

    def _print(self, text: str) -> None:
        if not self.quiet:
            try:
                sys.stderr.write(f"upshift: {text}\n")
                sys.stderr.flush()
            except (OSError, ValueError, AttributeError):
                pass


def _mean(losses: tuple[Any, ...]) -> float:
    """Mean of the losses read on the CPU; a script may mix devices."""
    values = [item for item in losses if type(item) is float]
    return sum(values) / len(values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
