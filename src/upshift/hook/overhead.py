"""What watching costs, calibrated in the process itself after the watching has ended."""

from __future__ import annotations

import mmap
import resource
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upshift.measure.steps import StepRecord

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

ROUNDS = 2000

#: What a root call changes in the watch.
_TOUCHED = ("forward", "accounted", "calls", "inner", "forward_end", "gap_mark", "_last_loader", "_fetch")


def fault_seconds(size: int = 8 * 2**20) -> float | None:
    """Seconds a minor page fault costs here: first touch of fresh pages against the second, the least of five tries."""
    found = []
    for _ in range(5):
        with mmap.mmap(-1, size) as memory:
            times = []
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            faults = 0
            for _ in range(2):
                start = time.perf_counter()
                for offset in range(0, size, mmap.PAGESIZE):
                    memory[offset] = 1
                times.append(time.perf_counter() - start)
                faults = faults or resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            if faults:
                found.append(max(times[0] - times[1], 0.0) / faults)
    return min(found, default=None)


def watching_cost(watch: Watch, torch: Any, records: Sequence[StepRecord]) -> float:
    """Seconds a step that the patches cost: calls seen in a step times the cost of one, measured on an empty module.

    Every call of a submodule passes through the patched `__call__` too; submodules are counted once a forward.
    """

    class Empty(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))  # without one it would not count as a model

        def forward(self, x: Any) -> Any:
            return x

    module = Empty()
    original = module._wrapped_call_impl
    state = {name: getattr(watch, name) for name in _TOUCHED}
    models = list(watch.models)
    # Root calls, backward passes, batches and optimizer steps, each about as costly as a root call.
    optimizers = max(len(watch.optimizers), 1)
    events = sum(r.calls + r.nograd_calls + len(r.losses) + r.batches + optimizers for r in records)

    def timed(call: Any) -> float:
        start = time.perf_counter()
        for _ in range(ROUNDS):
            call(1)
        return (time.perf_counter() - start) / ROUNDS

    plain = min(timed(original) for _ in range(3))
    root = min(timed(module) for _ in range(3)) - plain
    watch._busy = True
    try:
        inside = min(timed(module) for _ in range(3)) - plain
    finally:
        watch._busy = False
    for name, value in state.items():
        setattr(watch, name, value)
    watch.models[:] = models
    submodules = 0
    for reference in watch.models:
        model = reference()
        if model is not None:
            submodules += sum(1 for _ in model.modules())
    steps = max(len(records), 1)
    return max(root, 0.0) * events / steps + max(inside, 0.0) * submodules
