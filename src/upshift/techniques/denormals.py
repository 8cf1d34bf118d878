"""Flush denormal floating-point numbers to zero.

Idea: float32 values below 1.2e-38 are computed by microcode on many CPUs, a hundred times slower than normal ones. They
appear in decaying activations, in gradients far from the loss, and in Adam's second moment.
Limits: the mode belongs to each thread. `torch.set_flush_denormal` sets the calling thread only; OpenMP workers inherit
it when they are created. So the idle worker team is dismissed after each change (`omp_pause_resource_all`, OpenMP 5.0),
and what really happened is probed by an operation over all threads. Other native threads keep their mode.

Sources: docs.pytorch.org/docs/stable/generated/torch.set_flush_denormal.html; OpenMP 5.0 specification, section 3.2.44;
Dooley and Kale 2006, "Quantifying the Interference Caused by Subnormal Floating-Point Values".
"""

from __future__ import annotations

from typing import ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, ProcessStart, Verdict
from upshift.sites.protocol import BaseApplied

#: Elements one thread gets at least before torch splits an operation (at::internal::GRAIN_SIZE).
_GRAIN = 32768

_PAUSE_SOFT = 1


def flushed_share() -> float:
    """Share (0..1) of an operation, spread over all CPU threads, whose denormal results were flushed to zero."""
    import torch

    size = _GRAIN * 2 * max(1, torch.get_num_threads())
    # 1e-20 squared is 1e-40: a denormal of normal factors, so that only the arithmetic is tested.
    factor = torch.full((size,), 1e-20, dtype=torch.float32)
    bits = (factor * factor).view(torch.int32)
    return 1.0 - int(torch.count_nonzero(bits)) / size


def dismiss_workers() -> bool:
    """End the idle OpenMP workers of this process, so that the next ones inherit this thread's mode.

    Returns whether a runtime did so. Results are not touched: teams are created again on demand.
    """
    import ctypes
    import re
    from pathlib import Path

    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    done = False
    for path in sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[-.\w]*)$", loaded, flags=re.MULTILINE))):
        try:
            pause = ctypes.CDLL(path).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        pause.argtypes = [ctypes.c_int]
        pause.restype = ctypes.c_int
        done = pause(_PAUSE_SOFT) == 0 or done
    return done


def _set(on: bool) -> bool:
    """Set the mode in this thread and, as far as possible, in the workers. Returns whether the CPU supports it."""
    import torch

    if not torch.set_flush_denormal(on):
        return False
    if flushed_share() != float(on):
        dismiss_workers()
    return True


class _Flush(BaseApplied):
    def __init__(self, share: float) -> None:
        self._on = True
        self.note = (
            "denormal numbers are flushed to zero in all CPU threads"
            if share == 1.0
            else f"denormal numbers are flushed to zero in part of the CPU threads only ({share:.0%} of the work)"
        )

    def switch(self, on: bool) -> None:
        if on != self._on:
            _set(on)
            self._on = on

    def close(self) -> None:
        self.switch(False)


class Denormals:
    """`torch.set_flush_denormal(True)`, also for worker threads."""

    card: ClassVar[Card] = Card(
        name="denormals",
        summary="Flushes denormal numbers (below 1e-38) to zero.",
        source="torch.set_flush_denormal; Dooley and Kale 2006; OpenMP 5.0 omp_pause_resource_all",
        sites=("process_start",),
        numerics=Numerics.ROUNDING,
        switchable="live",
        targets=("forward", "backward", "optimizer"),
        details="Helps only where such numbers appear; then an operation can be many times faster.",
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Values below the smallest normal number become zero."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to training on the CPU that does not flush yet."""
        facts = seen.facts
        if not facts.device.startswith("cpu"):
            return Verdict(applies=False, reason=f"the training runs on {facts.device}; this is a mode of the CPU")
        if facts.flush_denormal:
            return Verdict(applies=False, reason="denormal numbers are flushed already")
        return Verdict(applies=True, reason="denormal numbers are slow on many CPUs; whether any occur was not seen")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Sets the mode in the fresh process."""
        if not isinstance(moment, ProcessStart):
            return None
        if flushed_share() == 1.0:
            dismiss_workers()
            return NoEffect("denormal numbers are flushed already")
        if not _set(True):
            dismiss_workers()
            return NoEffect("this CPU or build of torch cannot flush denormal numbers")
        share = flushed_share()
        # The probe has started a worker team; a script that forks must find the process as if nothing had run.
        dismiss_workers()
        if share == 0.0:
            _set(False)
            return NoEffect("the mode was accepted, but results are still denormal")
        return _Flush(share)
