"""`run`: the plan applied, guarded and recorded. Cheap: a few microseconds a step."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from upshift.errors import UsageError
from upshift.hook import ranges
from upshift.hook.controller import Controller, describe, exit_code
from upshift.hook.lossguard import LossGuard
from upshift.hook.pace import Pacing
from upshift.hook.remarks import Remarks
from upshift.measure.steps import TIMED, StepRecord, training_seconds
from upshift.records.runlog import LOG, RunLog
from upshift.sites.runner import ChildSpec
from upshift.units import seconds as in_words

#: A window of the log closes after this many seconds.
WINDOW = 1.0

#: On an accelerator the loss is looked at this many steps late, so that no synchronisation is added.
LATE = 32


class Late(NamedTuple):
    """A loss that is still on its device, and the step it belongs to."""

    step: int
    value: Any


class RunController(Controller):
    """Records a run; takes techniques off when the loss is no longer finite, leaves the band, or one raises."""

    window = WINDOW

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.quiet = bool(spec.options.get("quiet"))
        self.log = self._open_log()
        self.began = time.perf_counter()
        self.guarding = bool(spec.plan)
        self.looks_at_losses = False
        self.plan = dict(spec.plan)
        self.problem_seen: set[str] = set()
        self.last_loss: float | None = None
        self.late: list[Late] = []
        self.loss_guard: LossGuard | None = None
        self.ceiling = sys.float_info.max
        self.torch: Any = None
        self.steps = 0
        self.flusher: threading.Thread | None = None
        self.remarks = Remarks(self.log)
        self.pacing = Pacing(spec.options.get("pace"))
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

    def _open_log(self) -> RunLog:
        return RunLog(Path(self.spec.record))

    def torch_ready(self, torch: ModuleType) -> None:
        """Say what is patched."""
        self.torch = torch
        if ranges.wanted():
            ranges.install(torch, self.watch.patches)
        # Techniques act in every forward, and the guard looks at every loss.
        self.watch.may_sleep = not self.guarding
        self.looks_at_losses = self.guarding and self._has_band()
        self._event("patched", ", ".join(self.watch.patches.names()))
        if not self.spec.options.get("collect"):
            # Where all that is printed is collected, it is read there.
            self.remarks.listen(self.watch)

    def say(self, kind: str, name: str, text: str) -> None:
        """One line a technique, on stderr and in the log."""
        self._event(kind, f"{name}: {text}")
        self._print(f"{kind} {name}: {text}")

    def on_step(self, record: StepRecord) -> None:
        """Write a window of steps to the log."""
        self.steps += record.steps
        steps, losses = self._losses(record)
        if losses:
            self.last_loss = losses[-1]
        if self.looks_at_losses:
            self._look(steps, losses)
        self._tell_problems()
        # A teacher in every step is part of it.
        apart = self.remarks.passes.apart(self.steps)
        self.log.append(
            "steps",
            first=self.steps - record.steps,
            n=record.steps,
            at=record.at,
            seconds=training_seconds(record, apart),
            phases={name: getattr(record, name) for name in TIMED} if record.timed else {},
            loss=_finite(math.fsum(losses) / len(losses)) if losses else None,
            last_loss=_finite(self.last_loss),
            evaluation=record.nograd if apart else 0.0,
            checkpoint=record.checkpoint,
        )
        self.remarks.window(record, self.watch, self.steps)
        self.pacing.add(record, self.steps)

    def logged(self, values: dict[str, float]) -> None:
        """Metrics of the script, for the record."""
        self.remarks.metrics(values)

    def _losses(self, record: StepRecord) -> tuple[Sequence[int], list[float]]:
        """The losses that can be read without waiting, and the step each belongs to."""
        first, count, losses = self.steps - record.steps, len(record.losses), record.losses
        # Several a step are taken to be as many in each.
        steps: Sequence[int] = range(first, self.steps)
        if count != record.steps:
            steps = [first + i * record.steps // count for i in range(count)]
        if all(type(item) is float for item in losses):
            return steps, list(losses)
        ready: list[Late] = []
        for step, item in zip(steps, losses, strict=True):
            (ready if type(item) is float else self.late).append(Late(step, item))
        ready += self._read_late()
        ready.sort(key=lambda item: item.step)
        return [item.step for item in ready], [item.value for item in ready]

    def _read_late(self) -> list[Late]:
        """Losses of an accelerator, long after they were computed: the last `LATE` wait for the next window."""
        ready, self.late = self.late[:-LATE], self.late[-LATE:]
        if not ready:
            return []
        values = self.torch.stack([item.value.float().reshape(()) for item in ready]).tolist()
        if self.guarding and not all(map(math.isfinite, values)):
            self._come_off("the loss is not finite", ())
        return [Late(item.step, value) for item, value in zip(ready, values, strict=True)]

    def _has_band(self) -> bool:
        """Whether the plan has a band to hold the loss against; says so where it has none."""
        guard = self.spec.options.get("guard", {})
        reason = guard.get("no_band", "")
        if reason:
            self._only_finite(reason)
        return guard.get("band") is not None and not reason

    def _only_finite(self, reason: str) -> None:
        text = f"only a loss that is not finite takes the techniques off: {reason}"
        self._event("guarding", text)
        self._print(f"guard: {text}")

    def _look(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Hold the losses of a window against the band of the proof."""
        found = self.loss_guard
        if found is None:
            if self._in_group():
                self.looks_at_losses = False
                self._only_finite("several processes train together, the band is from one")
                return
            found = self.loss_guard = LossGuard(
                self.spec.options["guard"], self.stage, self.watch, self._remove, self._say_guard
            )
        found.add(steps, losses)
        self.ceiling = found.ceiling
        if found.done:
            self.looks_at_losses = False

    def _check_loss(self, loss: Any) -> bool:
        """Whether this update must be skipped: the loss is not finite while techniques are on."""
        if type(loss) is not float or -math.inf < loss <= self.ceiling:
            return False
        if math.isfinite(loss):
            # What explodes must not go on until the window of the record is over.
            self.watch.end_window()
            return False
        if not self.guarding:
            return False
        self._come_off(f"the loss is {loss}", ())
        if self._in_group():
            # All ranks share the gradient. One that held still would part from the others for good.
            self._print("guard: the update is made all the same, as the other ranks make it")
            return False
        return True

    def _in_group(self) -> bool:
        distributed = self.torch.distributed
        return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)

    def _come_off(self, reason: str, names: tuple[str, ...]) -> None:
        """Take techniques off on the spot and go on as the script was written."""
        for name in names or self.stage.names:
            self._remove(name, reason)
        step = self.watch.index + 1
        self._event("guard", f"step {step}: {reason}; the script's own path goes on")
        self._print(f"guard: step {step}: {reason}; the techniques came off, training goes on without them")

    def _remove(self, name: str, reason: str) -> None:
        """Take one technique off; without any, nothing is left to look after."""
        self.pacing.came_off()
        self.stage.remove(name, reason)
        self.watch.refresh()
        if not self.stage.names:
            self.guarding = False
            self.on_loss = None
            self.watch.on_loss = None

    def _say_guard(self, text: str) -> None:
        self._event("guard", text)
        self._print(f"guard: {text}")

    def rescue(self, module: Any, names: tuple[str, ...], error: Exception) -> None:
        """A technique raised, or the script did inside it: once more without the techniques."""
        self._come_off(describe(error), names)

    def finish(self, error: BaseException | None) -> None:
        """Close the record and say in one line what was seen."""
        elapsed = time.perf_counter() - self.began
        self.watch.flush()
        self.remarks.end(elapsed, self.watch, self.steps)
        if self.loss_guard is not None:
            self.loss_guard.finish()
        for name, reason in self.stage.effects().items():
            if reason:
                self._event("no effect", f"{name}: {reason}")
                self._print(f"no effect {name}: {reason}")
        if slow := self.pacing.remark(self.log.folder):
            self._event("slower", slow)
            self._print(slow)
        if below := _elsewhere(self.log.folder):
            self._event("children", below)
        self.log.append("end", code=exit_code(error), how=describe(error), seconds=elapsed, steps=self.steps)
        if isinstance(error, UsageError):
            self.quiet = True  # nothing ran; the error says why
        if self.log.broken:
            self._print(f"the record is incomplete: {self.log.broken}")
        if self.steps:
            self._print(f"{self.steps:,} steps in {in_words(elapsed)}; record: {self.log.folder}")
        else:
            self._print(_elsewhere(self.log.folder) or f"no training step was seen; record: {self.log.folder}")
        self.log.close()

    def _tell_problems(self) -> None:
        for name, text in self.stage.problems().items():
            if name not in self.problem_seen:
                self.problem_seen.add(name)
                self._say_guard(f"{name}: {text}")

    def _event(self, kind: str, text: str) -> None:
        self.log.append(kind, at=time.perf_counter() - self.began, text=text)

    def _print(self, text: str) -> None:
        if not self.quiet:
            try:
                sys.stderr.write(f"upshift: {text}\n")
                sys.stderr.flush()
            except (OSError, ValueError, AttributeError):
                pass


def _elsewhere(folder: Path) -> str:
    """Where processes below this one have trained, in words; empty if none has."""
    count = sum(1 for _ in folder.glob(f"*/{LOG}"))
    return f"{count} of its processes trained; records: {folder}/*" if count else ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
