"""Approaches side by side: what their runs reached, what these cost, and which differences are more than chance."""

from __future__ import annotations

from typing import Literal, NamedTuple

from upshift.records.ledger import Entry
from upshift.records.quantity import Quantity, Record

Mode = Literal["max", "min"]
Scale = Literal["log", "linear"]
Answer = Literal["better", "worse", "not distinguishable", "not tested", "unknown"]
Outcome = Literal["passed", "warned", "failed", "unknown"]


class Figure(NamedTuple):
    """A row of the comparison.

    `scale`: `log` for what is compared by ratios. `timed`: a drift of the machine changes it as the approach does.
    `tested`: whether a difference is judged at all. `mode` None: as the metric's.
    """

    title: str
    unit: str
    mode: Mode | None = "min"
    scale: Scale = "log"
    timed: bool = False
    tested: bool = False


#: In the order they are shown. The unit of what depends on the metric or the currency is filled in later.
FIGURES = {
    "metric": Figure("final performance", "", None, "linear", tested=True),
    "best": Figure("best performance", "", None, "linear"),
    "at_step": Figure("performance at the same step", "", None, "linear", tested=True),
    "at_time": Figure("performance after the same time", "", None, "linear", timed=True),
    "loss": Figure("final training loss", "", "min", "linear"),
    "to_target": Figure("time to target", "s", timed=True, tested=True),
    "steps_to_target": Figure("steps to target", "steps", tested=True),
    "step": Figure("time per step", "s", timed=True, tested=True),
    "time": Figure("duration", "s", timed=True, tested=True),
    "hours": Figure("compute hours", "h", timed=True),
    "cost": Figure("cost", "", timed=True, tested=True),
    "cost_per_epoch": Figure("cost per epoch", "", timed=True),
    "energy": Figure("energy", "J", timed=True, tested=True),
    "carbon": Figure("carbon", "g", timed=True),
    "memory": Figure("peak memory", "B", tested=True),
    "gpu_memory": Figure("peak accelerator memory", "B", tested=True),
    "parameters": Figure("parameters", "parameters"),
    "inference": Figure("inference time of a sample", "s", timed=True),
    "efficiency": Figure("efficiency", "", "max", "log", timed=True, tested=True),
}


class Point(Record, frozen=True, array_like=True):
    """A value after `step` updates and `at` seconds; None: not known, or a value that was not finite."""

    step: float | None
    at: float | None
    value: float | None


class Line(Record, frozen=True):
    """One run of an approach. `figures` that are not known, not finite or not reached are None."""

    run: str
    status: str
    started: str
    machine: str
    steps: int
    figures: dict[str, float | None] = {}
    metric: tuple[Point, ...] = ()
    loss: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()


class Approach(Record, frozen=True):
    """One or more runs that differ by nothing but chance. `figures` hold the middle over runs with its interval."""

    name: str
    runs: tuple[Line, ...]
    script: str = ""
    techniques: dict[str, dict[str, bool | int | float | str]] = {}
    machines: tuple[str, ...] = ()
    figures: dict[str, Entry] = {}
    phases: dict[str, float] = {}
    """Seconds of a step per phase, mean over the runs that tell it; not tested."""
    reached: int | None = None
    """Runs that reached the target; None without one."""
    front: tuple[str, ...] = ()
    """`cost`, `time`: no other approach performs as well for as little of it."""


class Difference(Record, frozen=True):
    """A figure of a later approach against the first.

    `change`: as a share of the first (`fraction`) where the figure is compared by ratios, else the later minus the
    first in the figure's unit. Its interval holds for this difference alone; `p` is corrected for their number.
    """

    figure: str
    approach: str
    against: str
    change: Quantity
    relative: bool
    answer: Answer
    reason: str
    p: float | None = None
    method: str = ""


class Gate(Record, frozen=True):
    """A limit that a later approach must keep, and whether it does."""

    text: str
    approach: str
    figure: str
    outcome: Outcome
    reason: str


class Comparison(Record, frozen=True):
    """The first approach is what the others are compared with."""

    created: str
    metric: str
    """Empty: none is known."""
    mode: Mode
    metric_note: str
    """Where it was found, or why it was chosen."""
    approaches: tuple[Approach, ...]
    differences: tuple[Difference, ...] = ()
    metrics: tuple[str, ...] = ()
    """Metrics that all runs have."""
    target: float | None = None
    currency: str = "USD"
    common_step: float | None = None
    """The last step that every run made; None where all are of one length."""
    common_time: float | None = None
    efficiency: str = ""
    """What efficiency is here, in words."""
    notes: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    level: float = 0.95
    schema: int = 1
