"""A watch on this process's torch, a clock that only work advances, and a ledger of where the work was done."""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from upshift.hook import books as books_module
from upshift.hook import watch as watch_module
from upshift.hook.controller import Controller
from upshift.hook.watch import Watch
from upshift.sites import Stage


class Ledger:
    """A clock in whole seconds. `work` advances it and books the time under the phase it belongs to."""

    def __init__(self, durations: tuple[int, ...] = (1,)) -> None:
        self.now = 1.0
        self.booked: Counter[str] = Counter()
        self.steps: list[Counter[str]] = []
        self._durations = durations
        self._used = 0

    def perf_counter(self) -> float:
        return self.now

    def work(self, phase: str) -> None:
        seconds = self._durations[self._used % len(self._durations)]
        self._used += 1
        self.now += seconds
        self.booked[phase] += seconds

    def step_ended(self) -> None:
        self.steps.append(self.booked)
        self.booked = Counter()


class Keeping(Controller):
    """Keeps the records of the steps."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.said: list[tuple[str, str, str]] = []

    def on_step(self, record: Any) -> None:
        self.records.append(record)

    def say(self, kind: str, name: str, text: str) -> None:
        self.said.append((kind, name, text))


@contextlib.contextmanager
def watched(controller: Controller | None = None, techniques: Any = (), clock: Ledger | None = None) -> Iterator[Any]:
    """torch under a watch; everything is restored at the end."""
    controller = controller or Keeping()
    stage = Stage(techniques, controller.say)
    watch = Watch(
        stage, controller.on_step, rescue=controller.rescue, on_loss=controller.on_loss, window=controller.window
    )
    controller.attach(stage, watch)
    real = watch_module.time
    if clock is not None:
        watch_module.time = books_module.time = types.SimpleNamespace(perf_counter=clock.perf_counter)
        watch.born = watch.last = clock.now
    try:
        watch.install(torch)
        controller.torch_ready(torch)
        yield controller
    finally:
        watch_module.time = books_module.time = real
        stage.close()
        watch.close()
