"""Segments of device memory that grow, in place of many of fixed size.

Idea: PyTorch's allocator asks the driver for segments and cuts them up. Where sizes change (sequence lengths, the last
batch), free pieces end up in the wrong sizes, the allocator must return segments and ask anew, which waits for the
device. With expandable segments there is one growing segment per stream, mapped page by page.
Limits: read when the process makes its first CUDA allocation, so it is set before the process exists. Tensors shared
between processes by CUDA handles are not supported everywhere. A training whose shapes never change gains nothing.

Source: docs.pytorch.org/docs/stable/notes/cuda.html, "Optimizing memory usage with PYTORCH_ALLOC_CONF".
"""

from __future__ import annotations

from typing import ClassVar

from upshift.hardware.device import kinds_here
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, ProcessEnv, Verdict
from upshift.sites.environment import EnvironmentApplied

#: The variable of PyTorch from 2.9 on, and those before it, which are still read.
VARIABLE = "PYTORCH_ALLOC_CONF"
OLD_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

OPTION = "expandable_segments"


class ExpandableSegments:
    """`PYTORCH_ALLOC_CONF=expandable_segments:True`."""

    card: ClassVar[Card] = Card(
        name="expandable_segments",
        summary="Lets segments of GPU memory grow, so that changing sizes do not fragment it.",
        source="docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf",
        sites=("process_env",),
        numerics=Numerics.BITWISE,
        switchable="process",
        targets=("forward", "backward", "optimizer"),
        details=f"Options the user has set in {VARIABLE} or {OLD_VARIABLES[0]} stay. Child processes inherit it.",
        tested_on=(),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Where a tensor lies in memory does not enter its value."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies to training on CUDA. What it gains is not known before a trial."""
        device = seen.facts.device
        if not device.startswith("cuda"):
            return Verdict(applies=False, reason=f"tensors live on {device}, not in CUDA's caching allocator")
        return Verdict(applies=True, reason="changing sizes may fragment the memory of the GPU")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Adds the option to the variable the user has set, or sets one."""
        if not isinstance(moment, ProcessEnv):
            return None
        env = moment.env
        taken = [name for name in (VARIABLE, *OLD_VARIABLES) if env.get(name)]
        if len(taken) > 1:
            return NoEffect(f"{' and '.join(taken)} are set both; which one counts depends on the version of PyTorch")
        name = taken[0] if taken else VARIABLE
        before = env.get(name, "").strip().strip(",")
        if OPTION in before:
            return NoEffect(f"{name} sets {OPTION} already, and the user's value wins")
        if "backend:" in before.replace(" ", "") and "backend:native" not in before.replace(" ", ""):
            return NoEffect(f"{name} chooses an allocator that has no segments")
        if "cuda" not in kinds_here():
            return NoEffect("this machine has no NVIDIA GPU")
        value = f"{before},{OPTION}:True" if before else f"{OPTION}:True"
        return EnvironmentApplied(env, {name: value}, "segments of GPU memory grow instead of multiplying")
