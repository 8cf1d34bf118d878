"""Joules of a run: measured where this machine counts them, else an estimate that says so.

The estimate is cores x idle watts x wall time + (busy - idle watts) x CPU time of the process tree. It knows nothing of
frequency, vector units or memory, so it ranks plans as time and CPU time do, and no better. There is none for a GPU:
its power does not follow from the time of any process.

Of a sum, the weakest part names the basis: a measured GPU beside an estimated processor is an estimate.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from upshift.errors import EnvironmentError_
from upshift.hardware.machine import usable_cores
from upshift.hardware.watts import Watts
from upshift.measure.counters import OTHER_WAY, POWERCAP, Counter, Nvml, Rapl, Read
from upshift.measure.tree import Tree
from upshift.records.quantity import Basis


@dataclass(frozen=True)
class Estimate:
    """Energy of the processor from the CPU time of a process tree; `watts` of one logical core."""

    watts: Watts
    cores: int

    @property
    def what(self) -> str:
        """The figures it rests on."""
        low, high = self.watts.idle, self.watts.busy
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return f"CPU time and wall time ({cores} at {low:g} to {high:g} W each, {self.watts.source})"

    def joules(self, seconds: float, cpu_seconds: float) -> float:
        """Joules of `seconds` of wall time with `cpu_seconds` of all cores together."""
        return self.cores * self.watts.idle * seconds + (self.watts.busy - self.watts.idle) * cpu_seconds

    def begin(self, pid: int) -> Read:
        """Count from now on, for the tree of `pid`."""
        tree = Tree(pid)
        began, before = time.monotonic(), tree.spent().cpu
        return lambda: self.joules(time.monotonic() - began, tree.spent().cpu - before)


@dataclass(frozen=True)
class Meter:
    """What the joules of a run are read from on this machine; `how` says it in a sentence for people."""

    counters: tuple[Counter, ...]
    basis: Basis
    how: str

    def begin(self, pid: int) -> Read:
        """Joules of the process tree of `pid` from now on, to be read now and then and before the tree is reaped.

        None where one of the counters did not count: a sum of the others is not the energy of the run.
        """
        reads = [counter.begin(pid) for counter in self.counters]

        def joules() -> float | None:
            found = [read() for read in reads]
            known = [value for value in found if value is not None]
            return sum(known) if len(known) == len(found) else None

        return joules


def meter(device: str, watts: Watts, *, powercap: Path = POWERCAP) -> Meter:
    """The meter for a training on `device` (`cpu`, `cuda:0`).

    Args:
        watts: of a logical core, for where the processor's counter cannot be read.

    Raises:
        MissingExtraError, EnvironmentError_: the training uses an accelerator whose energy cannot be read here.
    """
    kind = device.partition(":")[0]
    rapl = Rapl.here(powercap)
    processor: Counter = rapl or Estimate(watts, usable_cores())
    if kind == "cuda":
        gpus = Nvml.here(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if rapl is not None:
            return Meter((gpus, rapl), "measured", f"energy is measured: {gpus.what}; {rapl.what}")
        how = f"energy is estimated: {gpus.what}; the processor from {processor.what}"
        return Meter((gpus, processor), "estimated", how)
    if kind != "cpu":
        raise EnvironmentError_(f"the energy of a training on {device} cannot be read here.", remedy=OTHER_WAY)
    if rapl is not None:
        return Meter((rapl,), "measured", f"energy is measured: {rapl.what}")
    how = f"on this machine energy is estimated from {processor.what}: it ranks plans as these do"
    return Meter((processor,), "estimated", how)
