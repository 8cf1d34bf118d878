"""Waiting until a device has done what it was given.

The host only queues work on a CUDA device. Where a stretch of steps is timed by the host's clock, what is still queued
at its end belongs to it (CUDA C++ Best Practices Guide, "Using CPU Timers").
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upshift.hook.watch import Watch


def drain(torch: Any, watch: Watch) -> float:
    """Wait for the current CUDA device and those that hold trained parameters. Returns the seconds it took.

    Does nothing, and starts nothing, where CUDA is not in use.
    """
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    devices = {torch.device("cuda", torch.cuda.current_device())}
    for reference in watch.optimizers:
        optimizer = reference()
        for group in () if optimizer is None else optimizer.param_groups:
            devices.update(item.device for item in group["params"] if item.is_cuda)
    start = time.perf_counter()
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
