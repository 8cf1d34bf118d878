"""How well several ranks use what they have: their samples per second against as many times those of one alone.

One rank alone is timed inside the training, by updates that are made in turn: rank 0 computes its gradient while the
others wait, then they compute theirs; all agree and average as ever; rank 0 makes its step while the others wait, then
they make theirs. Who computes when changes no value, so weights, random streams, statistics and the order of the data
are those of a training without it, bit for bit. Such updates alternate with ordinary ones (ABBA, against drift), and
cost at most as much again: they are few, and at most one in a hundred of those that a run still makes.

Both kinds are timed from the batch in hand to the end of the step, without reading data, evaluation and saving; an
ordinary one ends when the slowest rank has made its step. Loader workers of the other ranks go on while these wait.

Limits. FSDP2 exchanges weights inside every pass: no rank can work alone. Where torch's own reducer overlaps with the
backward pass (CUDA), ranks take turns before it begins to and ordinary updates are timed after; never run on several
CUDA devices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from upshift import units
from upshift.engine.group import SAFE_STEPS
from upshift.measure.noninferior import ratio
from upshift.records.quantity import Quantity, unknown

if TYPE_CHECKING:
    from upshift.engine.batches import Batch
    from upshift.engine.group import Group

Kind = Literal["turn", "together", ""]

#: Updates of a process that are not timed: what is compiled, allocated or chosen once.
WARM = 4

#: Groups of four updates (two in turn, two together): the fewest that bound a ratio usefully, and the most.
LEAST_QUADS, MOST_QUADS = 3, 6

#: Of the updates that a run still makes, the most that are made in turn.
SHARE = 0.01

#: Two-sided 95 % bounds.
_ONE_SIDED = 0.975


@dataclass(frozen=True)
class Scaling:
    """What came of it; `why` it is unknown where it is. Rates in samples per second."""

    efficiency: Quantity
    together: float | None = None
    alone: float | None = None
    updates: int = 0
    why: str = ""


def not_measured(why: str) -> Scaling:
    """Scaling efficiency is unknown."""
    return Scaling(unknown("ratio"), why=why)


def efficiency(together: Sequence[float], world: int, alone: Sequence[float]) -> Quantity:
    """Scaling efficiency: 1 means that `world` ranks do `world` times the work of one.

    Args:
        together: samples per second of all ranks, one figure per group of updates.
        world: number of ranks.
        alone: samples per second of one rank alone, measured beside each of those.

    Returns:
        The geometric mean of the ratios with two-sided 95 % bounds (Student's t on their logarithms).

    Raises:
        ValueError: a rate or number of ranks that is not positive, or sequences that differ in length.
    """
    if world < 1 or not together or len(together) != len(alone) or min(*together, *alone) <= 0:
        raise ValueError(f"need positive rates and ranks in pairs, got {together}, {world}, {alone}")
    found = ratio(list(together), [world * rate for rate in alone], _ONE_SIDED)
    return Quantity(found.mean, "ratio", found.low, found.high, found.n)


def sentence(speed: float, world: int, found: Scaling) -> str:
    """What the record says of it.

    Args:
        speed: samples per second of all ranks over the whole run.
    """
    ranks = f"{world} ranks: {units.si(speed, 'samples/s')}"
    ratio = found.efficiency
    if ratio.value is None or found.alone is None or found.together is None:
        return f"{ranks}; scaling efficiency unknown: {found.why}"
    bounds = ""
    if ratio.low is not None and ratio.high is not None:
        bounds = f" ({units.percent(ratio.low)} to {units.percent(ratio.high)} at 95 %)"
    return (
        f"{ranks}; scaling efficiency {units.percent(ratio.value)}{bounds}, measured in {found.updates} updates: "
        f"{units.si(found.together, 'samples/s')} are so much of {world} times {units.si(found.alone, 'samples/s')}, "
        "those of rank 0 with the others waiting (without reading data, evaluation and saving)"
    )


def schedule(left: int | None, *, sharded: bool, overlaps: bool) -> tuple[list[Kind], str]:
    """What becomes of the first updates of a process, or why nothing is timed.

    Args:
        left: updates that the run still makes; None: not known.
        sharded: weights are exchanged inside every pass.
        overlaps: torch's own reducer takes over after `SAFE_STEPS` updates.
    """
    if sharded:
        return [], "sharded weights are exchanged in every pass, so that no rank can work alone"
    if left is None:
        return [], "how long the run is, is not known, nor what timing one rank alone would cost it"
    quads = min(int(left * SHARE) // 2, MOST_QUADS)
    if overlaps:
        quads = min(quads, (SAFE_STEPS - WARM) // 2)
    if quads < LEAST_QUADS:
        least = int(2 * LEAST_QUADS / SHARE)
        return [], f"one rank alone is timed in runs of {least:,} updates or more, this one makes {left:,}"
    warm: list[Kind] = [""] * WARM
    if overlaps:
        between: list[Kind] = [""] * (SAFE_STEPS - WARM - 2 * quads + 2)
        turns: list[Kind] = ["turn"] * (2 * quads)
        together: list[Kind] = ["together"] * (2 * quads)
        return [*warm, *turns, *between, *together], ""
    orders: tuple[list[Kind], list[Kind]] = (
        ["turn", "together", "together", "turn"],
        ["together", "turn", "turn", "together"],
    )
    return [*warm, *(kind for quad in range(quads) for kind in orders[quad % 2])], ""


class Turns:
    """Times the first updates of a process, some of them made in turn. All ranks call the same methods alike."""

    def __init__(self, group: Group, kinds: Sequence[Kind]) -> None:
        """
        Args:
            kinds: of the updates to come, from `schedule`; the same on every rank.
        """
        self._group = group
        self._kinds = list(kinds)
        self._at = -1
        self._kind: Kind = ""
        self._samples = self._own = 0
        self._mark = self._seconds = 0.0
        self._alone: list[tuple[int, float]] = []
        self._together: list[tuple[int, float]] = []

    def begins(self, batch: Batch) -> None:
        """The batch of an update is there."""
        self._at += 1
        self._kind = self._kinds[self._at]
        if not self._kind:
            return
        self._samples, self._own = batch.samples, sum(part.n for part in batch.parts)
        self._group.barrier()
        if self._kind == "turn" and not self._group.main:
            self._group.barrier()
        self._mark, self._seconds = time.perf_counter(), 0.0

    def computed(self) -> None:
        """The gradient of this rank's share is there; nothing is agreed yet."""
        if self._kind == "turn" and self._group.main:
            self._pause()
            self._group.barrier()

    def agreed(self) -> None:
        """Gradients are averaged; the step comes next."""
        if self._kind == "turn":
            if not self._group.main:
                self._group.barrier()
            self._mark = time.perf_counter()

    def ends(self) -> Scaling | None:
        """The step is made. What was found once all updates are timed, on rank 0; None before, and on other ranks."""
        if self._kind:
            self._pause()
        if self._kind == "turn":
            if self._group.main:
                self._group.barrier()
            # Once more, so that the next update begins when the others have made their step, too.
            self._group.barrier()
            self._alone.append((self._own, self._seconds))
        elif self._kind:
            self._together.append((self._samples, self._seconds))
        return self._conclude() if self.over else None

    @property
    def over(self) -> bool:
        """Whether all is timed."""
        return self._at + 1 == len(self._kinds)

    def _pause(self) -> None:
        if self._group.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._group.device)
        self._seconds += time.perf_counter() - self._mark

    def _conclude(self) -> Scaling | None:
        told: list[Any] | None = self._group.gather([seconds for _, seconds in self._together])
        if told is None:
            return None
        slowest = [max(seconds) for seconds in zip(*told, strict=True)]
        together = _rates([(samples, s) for (samples, _), s in zip(self._together, slowest, strict=True)])
        alone = _rates(self._alone)
        if not alone or min(*together, *alone) <= 0:
            return not_measured("an update of rank 0 had no sample in it")
        return Scaling(
            efficiency(together, self._group.world, alone),
            together=_mean(together),
            alone=_mean(alone),
            updates=len(self._together) + len(self._alone),
        )


def _rates(timed: Sequence[tuple[int, float]]) -> list[float]:
    """Samples per second of every two updates, which are those of one group."""
    pairs = zip(timed[::2], timed[1::2], strict=True)
    return [(a + b) / max(s + t, 1e-9) for (a, s), (b, t) in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
