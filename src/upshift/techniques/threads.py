"""The number of CPU threads one operation is spread over.

Idea: torch takes every physical core. Small operations lose more to the fork-join of the OpenMP team than they gain,
and other processes (loader workers) may need the cores; large ones may gain from more.
Limits: only intra-operation threads; the inter-operation pool cannot be changed once it has been used. Sums are split
differently, so results differ by rounding.

Source: docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html; PyTorch performance tuning guide.
"""

from __future__ import annotations

from typing import ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, ProcessStart, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec


def candidates(cores: int, current: int) -> tuple[int, ...]:
    """Thread counts worth trying on `cores` physical cores, other than the `current` one (0 = not known)."""
    wanted = [cores, cores // 2, 1] if cores > 0 else [1]
    result: list[int] = []
    for count in wanted:
        if count >= 1 and count != current and count not in result:
            result.append(count)
    return tuple(result)


class _Threads(BaseApplied):
    def __init__(self, count: int, before: int) -> None:
        self.note = f"{count} threads per operation instead of {before}"
        self._count = count
        self._before = before
        self._on = False
        self.switch(True)

    def switch(self, on: bool) -> None:
        import torch

        torch.set_num_threads(self._count if on else self._before)
        self._on = on

    def effect(self) -> NoEffect | None:
        import torch

        if self._on and (now := torch.get_num_threads()) != self._count:
            return NoEffect(f"the script has set {now} threads itself since")
        return None

    def close(self) -> None:
        import torch

        # Whoever changed the count after us keeps what they set.
        if self._on and torch.get_num_threads() == self._count:
            torch.set_num_threads(self._before)
        self._on = False


class Threads:
    """`torch.set_num_threads`."""

    card: ClassVar[Card] = Card(
        name="threads",
        summary="Sets how many CPU threads one operation is spread over.",
        source="torch.set_num_threads; PyTorch performance tuning guide",
        sites=("process_start", "model_created"),
        numerics=Numerics.ROUNDING,
        switchable="live",
        targets=("forward", "loss", "backward", "optimizer"),
        details="A count the script sets itself is overridden when its first model is called.",
        settings={
            "intra": SettingSpec(
                default=0,
                doc="threads per operation; 0 means one for each physical core this process may use",
                low=0,
                high=4096,
            )
        },
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Sums are split among another number of threads."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to training on the CPU where another count exists."""
        facts = seen.facts
        if not facts.device.startswith("cpu"):
            return Verdict(applies=False, reason=f"the training runs on {facts.device}, not on CPU threads")
        counts = candidates(facts.cores, facts.threads)
        if facts.cores == 1 or not counts:
            return Verdict(applies=False, reason="one core, so there is nothing to divide")
        current = f"{facts.threads} threads" if facts.threads else "an unknown number of threads"
        where = f"{facts.cores} cores" if facts.cores else "an unknown number of cores"
        return Verdict(
            applies=True,
            reason=f"{current} on {where}; small operations can be faster with fewer",
            candidates=tuple({"intra": count} for count in counts),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Sets the count in the fresh process, and once more if the script has set another by its first model call."""
        if not isinstance(moment, (ProcessStart, ModelSeen)):
            return None
        import torch

        count = int(settings.get("intra", 0)) or _physical_cores()
        current = torch.get_num_threads()
        if count == current:
            if isinstance(moment, ModelSeen):
                return None
            return NoEffect(f"torch uses {current} threads already")
        return _Threads(count, current)


def _physical_cores() -> int:
    import os

    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
