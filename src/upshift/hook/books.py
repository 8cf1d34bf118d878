"""The books of a watch: which second belongs to which phase, and where one global step ends."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upshift.hook.patch import Patches
from upshift.measure.steps import StepRecord
from upshift.sites import Stage

#: An optimizer that did not step while another stepped this often no longer belongs to the global step.
FORGET_AFTER = 16

#: Naps, in units of `NAP` seconds: steps are only counted before one is timed again. Uneven, so that no rhythm of the
#: script is met.
NAPS = (1.0, 0.7, 1.3, 0.85, 1.15, 1.0, 1.4, 0.6)
NAP = 0.03

#: The first steps are all timed.
AWAKE_STEPS = 32

Rescue = Callable[[Any, tuple[str, ...], Exception], None]


@dataclass(slots=True)
class _Doubt:
    """Batches of a loader that has been used for evaluation, fetched with gradients on: for what, is seen later."""

    loader: int
    span_end: float
    """End of the evaluation before."""
    seconds: float = 0.0
    batches: int = 0
    epochs: int = 0


class Books:
    """What has been seen since the last step, and the rules by which evaluation is told from training.

    With `may_sleep`, most steps are only counted: what a Python wrapper costs between two kernels is some 40 us a step
    (its code and data have left the caches), too much for steps below a millisecond. What is not training wakes
    the books: a model called without gradients or in evaluation mode, a new iterator.

    A span is a stretch of work without gradients or in evaluation mode. What it was for is seen when it is over.
    """

    # Contiguous, the hot ones first: between two steps the caches have been filled with something else.
    __slots__ = (  # noqa: RUF023  (the order is the point)
        "_busy", "_asleep", "_nap", "thread", "inner", "accounted", "span_start", "span_end", "forward", "forward_end",
        "gap_mark", "calls", "loss", "backward", "losses", "on_loss", "_in_backward", "_in_data", "data", "batches",
        "optimizer", "_opt_stack", "_guards", "_active", "_skip", "_withheld", "index", "steps", "_until",
        "_last_boundary", "_last_loader", "_around", "_iterators", "thread_known", "first_work", "loss_seen",
        "create_graph", "_stepped", "_fetch", "_evaluation_loaders", "waits", "epochs", "stage", "on_step", "rescue",
        "scratch", "main_guard", "window", "patches", "pid", "born", "last", "grad_only", "models", "shapes", "loaders",
        "optimizers", "closures", "_handles", "_alive", "_doubt", "_loader_numbers", "_eval_trains", "h2d", "sync",
        "nograd", "checkpoint", "nograd_calls", "span_modules", "_generator", "_grad_enabled", "_is_tracing",
        "_awake", "_woken", "_naps", "may_sleep", "timed_steps", "span_rows", "on_span",
    )  # fmt: skip

    _grad_enabled: Callable[[], bool]
    _is_tracing: Callable[[], bool]
    _generator: Any

    def __init__(
        self,
        stage: Stage,
        on_step: Callable[[StepRecord], None],
        *,
        rescue: Rescue,
        on_loss: Callable[[Any], bool] | None = None,
        scratch: str = "",
        main_guard: bool = False,
        window: float = 0.0,
    ) -> None:
        """
        Args:
            stage: the techniques.
            on_step: called at the end of every global step; its own time is in no step.
            window: with more than 0, `on_step` is called after so many seconds only, with the sums of the steps
                since; what is left at the end comes with `flush`.
            rescue: called when a technique raised around a forward call or before an optimizer step; returns to let
                the original path go on, or raises.
            on_loss: called with the scalar a backward call starts from (a float on the CPU, a detached tensor
                elsewhere); True means: skip this update.
        """
        self.stage = stage
        self.on_step = on_step
        self.rescue = rescue
        self.on_loss = on_loss
        self.scratch = scratch
        self.main_guard = main_guard
        self.window = window
        self.patches = Patches()
        self.pid = os.getpid()
        self.thread = threading.main_thread().ident or 0
        self.thread_known = False
        self.born = time.perf_counter()
        self.first_work: float | None = None
        self.index = 0
        self.last = self.born
        self.create_graph = False
        self.grad_only = False
        self.loss_seen = False
        self.models: list[weakref.ref[Any]] = []
        self.shapes: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.loaders: list[weakref.ref[Any]] = []
        self.waits: dict[int, list[float]] = {}
        self.optimizers: list[weakref.ref[Any]] = []
        self.closures: set[int] = set()
        self._handles: list[Any] = []
        self._around: dict[int, tuple[tuple[tuple[str, Any], ...], bool]] = {}
        self._guards: dict[int, tuple[tuple[str, Any], ...]] = {}
        self._alive: dict[int, Any] = {}
        self._active: dict[int, int] = {}
        self._stepped: set[int] = set()
        self._iterators: dict[int, tuple[int, Any, Any]] = {}
        self._evaluation_loaders: set[int] = set()
        self._last_loader = 0
        self._until = self._last_boundary = 0.0
        self._fetch: tuple[int, float, float] | None = None
        self._doubt: _Doubt | None = None
        self._loader_numbers: dict[int, int] = {}
        self._opt_stack: list[tuple[int, float, float]] = []
        self._withheld: list[tuple[Any, Any]] = []
        self._busy = False
        self.may_sleep = False
        self._asleep = self._woken = False
        self._nap = self._naps = 0
        self._in_data = False
        self._in_backward = False
        self._skip = False
        self._eval_trains: set[int] = set()
        self.timed_steps = 0
        """Steps whose phases and batches were looked at, over the whole run."""
        self.on_span: Callable[[float, float], None] | None = None
        """Told the seconds of every span, and the rows its model was called with (NaN: not known)."""
        self._reset()

    def _reset(self) -> None:
        """Start a new step."""
        self.data = self.h2d = self.forward = self.loss = self.backward = self.optimizer = self.sync = 0.0
        self.nograd = self.checkpoint = 0.0
        self.nograd_calls = self.batches = self.calls = self.epochs = 0
        self.losses: list[Any] = []
        self.inner = 0.0
        self.accounted = 0.0
        self.forward_end = 0.0
        self.gap_mark = 0.0
        self.span_start = 0.0
        self.span_end = 0.0
        self.span_modules: set[int] = set()
        self.span_rows: dict[int, float] = {}
        self.steps = self._awake = 0

    def evaluation_only(self, loader: Any) -> bool:
        """Whether this loader's batches were only ever used without gradients."""
        return self._loader_numbers.get(id(loader)) in self._evaluation_loaders or self.waited(loader)[1] == 0

    def waited(self, loader: Any) -> tuple[float, float]:
        """Seconds that training waited for this loader, and for how many batches."""
        seconds, batches = self.waits.get(self._loader_numbers.get(id(loader), 0), (0.0, 0.0))
        return seconds, batches

    def _work_begins(self, now: float) -> None:
        """Start-up ends with the first batch fetched, model called, backward pass or step."""
        if self.first_work is None:
            self.first_work = self.last = now

    def _open_span(self, start: float, module: Any) -> None:
        """Work without gradients, or in evaluation mode, begins or goes on."""
        gradients = self._grad_enabled()
        fetch, self._fetch, self._doubt = self._fetch, None, None
        if fetch is not None:
            # The batch was fetched for this, not for training; a loader met so for the first time was taken for
            # the training loader. Without gradients it may still be a teacher's, before the student's forward.
            self._evaluation_loaders.add(fetch[0])
            if gradients and not self.span_start:
                self._count_data(fetch[0], -fetch[2], -1)
                start = fetch[1]
        if not self.span_start:
            self.span_start = start
        if gradients:
            self.span_modules.add(id(module))

    def _leave_span(self) -> None:
        """Training goes on. A batch fetched since the last evaluated one was fetched for training."""
        doubt = self._doubt
        if doubt is None:
            self._close_span()
            return
        self._doubt = None
        self.span_end = doubt.span_end
        self._close_span()
        self.epochs += doubt.epochs
        self._count_data(doubt.loader, doubt.seconds, doubt.batches)

    def _close_span(self) -> None:
        took = self.span_end - self.span_start
        self.nograd += took
        self.accounted += took
        self.span_start = 0.0
        self.span_modules.clear()
        if self.on_span is not None:
            # Of several models of one evaluation, the one called with the most rows has seen every sample.
            self.on_span(took, max(self.span_rows.values(), default=math.nan))
        self.span_rows.clear()

    def _data_done(self, start: float, outer: float, end: float, key: int, grad: bool, batch: int, epoch: int) -> None:
        took = end - start
        alone = took - self.inner
        self.inner = outer + took
        if not grad or key in self._evaluation_loaders:
            if not self.span_start:
                self.span_start = self.span_end = start
            if grad:
                doubt = self._doubt = self._doubt or _Doubt(key, self.span_end)
                doubt.seconds += alone
                doubt.batches += batch
                doubt.epochs += epoch
            self.span_end = end
            return
        if self.span_start:
            self._leave_span()
        self.epochs += epoch
        self._count_data(key, alone, batch)
        self._fetch = (key, start, alone) if batch else None

    def _count_data(self, key: int, seconds: float, batches: int) -> None:
        self.accounted += seconds
        self.data += seconds
        self.batches += batches
        wait = self.waits.get(key)
        if wait is None:
            wait = self.waits[key] = [0.0, 0.0]
        wait[0] += seconds
        wait[1] += batches

    def _is_boundary(self, key: int) -> bool:
        """Whether this optimizer step ends a global step: every optimizer in use has stepped since the last."""
        active = self._active
        active[key] = 0
        if len(active) == 1:
            if self._stepped:
                self._stepped.clear()
            return True
        self._stepped.add(key)
        for other in list(active):
            if other not in self._stepped:
                active[other] += 1
                if active[other] > FORGET_AFTER:
                    del active[other]
        if not self._stepped.issuperset(active):
            return False
        self._stepped.clear()
        return True

    def flush(self) -> None:
        """Hand over the steps of a window under way, and the evaluation after the last step."""
        if self.steps:
            self._boundary(self._last_boundary)
        elif self.span_start:
            self._leave_span()

    def end_window(self) -> None:
        """Let the window under way end with the step under way."""
        self._until = 0.0

    def _step_timed(self, end: float) -> None:
        """A step ended that was timed from its beginning, or from when the books were woken."""
        took = end - self._last_boundary
        self._last_boundary = end
        self.index += 1
        self.steps += 1
        self._awake += 1
        self._skip = self._woken = False
        if end >= self._until:
            self._boundary(end)
        if self.may_sleep and self.index >= AWAKE_STEPS and not self.span_start:
            self._naps += 1
            self._nap = int(NAP * NAPS[self._naps % len(NAPS)] / took)
            self._asleep = self._nap > 0

    def _step_counted(self, end: float) -> None:
        """A step ended that was only counted."""
        self._last_boundary = end
        self.index += 1
        self.steps += 1
        self._nap -= 1
        if not self._nap:
            self._asleep = False
            self.forward_end = 0.0
            self._fetch = None

    def _wake(self) -> None:
        """Something else than training begins."""
        self._asleep = False
        self._woken = True
        self.forward_end = 0.0
        self._fetch = None

    def _boundary(self, end: float) -> None:
        if self.span_start:
            self._leave_span()
        self.timed_steps += self._awake
        scale = self.steps / self._awake if self._awake else 0.0
        record = StepRecord(
            self.index - 1,
            end - self.born,
            end - self.last,
            self.data * scale,
            self.h2d * scale,
            self.forward * scale,
            self.loss * scale,
            self.backward * scale,
            self.optimizer * scale,
            self.sync * scale,
            self.nograd,
            self.nograd_calls,
            self.checkpoint,
            self.batches,
            self.epochs,
            self.calls,
            tuple(self.losses),
            self.steps,
            self._awake,
        )
        self._until = end + self.window
        self._reset()
        try:
            self.on_step(record)
        finally:
            self.last = time.perf_counter()
