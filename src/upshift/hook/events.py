"""Device time of the phases by events (diagnosis only, CUDA only). Never run on a device yet: `untested on cuda`.

Kernels run behind the host. An event recorded on the current stream of the model's device before and after a phase
gives the time its kernels took; it is read some steps later, when it has long happened, so no synchronisation is added.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.measure.stats import mean_interval
from upshift.records import Quantity

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Steps whose events may wait to be read; older ones that have not happened are dropped and count as not seen.
WAITING_STEPS = 64


class StreamEvent:
    """An event on the stream that is current on one device, which need not be the current device."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch, self._device = torch, device
        self.event = torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        """Queue it."""
        self.event.record(self._torch.cuda.current_stream(self._device))

    def query(self) -> bool:
        """Whether it has happened."""
        return bool(self.event.query())

    def elapsed_time(self, end: StreamEvent) -> float:
        """Milliseconds to `end`."""
        return float(self.event.elapsed_time(end.event))


class DevicePhases:
    """Records events around root forward calls, backward passes and optimizer steps."""

    def __init__(self, watch: Watch, new_event: Callable[[], Any]) -> None:
        """
        Args:
            new_event: makes an event with `record()`, `query()` and `elapsed_time(end)` in milliseconds.
        """
        self._watch = watch
        self._new = new_event
        self._patches = Patches()
        self._handles: list[Any] = []
        self._busy = False
        self._open: list[Any] = []
        self._step: list[tuple[str, Any, Any]] = []
        self._waiting: deque[list[tuple[str, Any, Any]]] = deque()
        self._seen: list[dict[str, float]] = []
        self.dropped = 0

    def install(self, torch: Any) -> None:
        """Patch outside of the watch's own patches, which stay as they are."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        call, backward = torch.nn.Module.__call__, torch.autograd.backward

        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
            if self._busy or not self._is_model(module) or not torch.is_grad_enabled():
                return call(module, *args, **kwargs)
            return self._around("forward", call, (module, *args), kwargs)

        def backward_(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return backward(*args, **kwargs)
            return self._around("backward", backward, args, kwargs)

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            if self._mine():
                self._open.append(self._mark())

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            if self._mine() and self._open:
                self._step.append(("optimizer", self._open.pop(), self._mark()))

        self._patches.set(torch.nn.Module, "__call__", like(call, __call__))
        self._patches.set(torch.autograd, "backward", like(backward, backward_))
        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def close(self) -> None:
        """Take everything out."""
        self._patches.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _mine(self) -> bool:
        return threading.get_ident() == self._watch.thread

    def _is_model(self, module: Any) -> bool:
        return self._mine() and any(reference() is module for reference in self._watch.models)

    def _mark(self) -> Any:
        event = self._new()
        event.record()
        return event

    def _around(self, phase: str, call: Any, args: Any, kwargs: Any) -> Any:
        start = self._mark()
        self._busy = True
        try:
            return call(*args, **kwargs)
        finally:
            self._busy = False
            self._step.append((phase, start, self._mark()))

    def after_step(self) -> None:
        """A global step has ended: queue its events, read those of earlier steps that have happened."""
        self._waiting.append(self._step)
        self._step = []
        while self._waiting and all(end.query() for _, _, end in self._waiting[0]):
            sums: dict[str, float] = {}
            for phase, start, end in self._waiting.popleft():
                sums[phase] = sums.get(phase, 0.0) + start.elapsed_time(end) / 1e3
            if sums:
                self._seen.append(sums)
        while len(self._waiting) > WAITING_STEPS:
            self._waiting.popleft()
            self.dropped += 1

    def seconds(self, warm: int) -> dict[str, Quantity]:
        """Phase -> device seconds a step, without the first `warm` steps; nothing that was not seen."""
        steady = self._seen[warm:]
        names = dict.fromkeys(name for step in steady for name in step)
        return {name: mean_interval([step.get(name, 0.0) for step in steady]) for name in names}
