"""The plan: the techniques kept, their settings, the evidence for each. Read, edited and committed by people."""

from __future__ import annotations

import math

from upshift.records.quantity import Record
from upshift.records.trial import Proof
from upshift.records.verification import Energy, Interval

SCHEMA = 1

Setting = bool | int | float | str


class Kept(Record, frozen=True):
    """A technique in the plan. `speedup` is what screening saw when it joined those before it, with its one-sided
    99 % interval; the figure of the whole plan against stock is the plan's own.

    `attribution` is the factor lost when this technique alone is taken out of the plan (leave-one-out).
    """

    name: str
    settings: dict[str, Setting] = {}
    numerics: str = "rounding"
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    attribution: float | None = None
    attribution_low: float | None = None
    attribution_high: float | None = None
    one_off_seconds: float = 0.0
    note: str = ""


class Rejected(Record, frozen=True):
    """A technique that was not kept, and why."""

    name: str
    reason: str
    settings: dict[str, Setting] = {}
    speedup: float | None = None
    low: float | None = None
    high: float | None = None


class Fingerprint(Record, frozen=True):
    """What the plan was measured on. A mismatch makes the plan stale."""

    script: str
    sources: str
    """SHA-256 over the script and the modules beside it that it imported (`files`)."""
    arguments: str
    device: str
    versions: str
    files: tuple[str, ...] = ()
    settings: str = ""
    """SHA-256 over the techniques and settings: an edited plan was not measured."""


class Pace(Record, frozen=True):
    """How long a step of the plan took when it was confirmed: what later runs with the plan are held against.

    `seconds` is the median over `stretches` of about a second each, `low` and `high` are their least and their most;
    evaluation and checkpoints apart, as in the windows of a run. `samples_per_second`: None where the batch was not
    seen. `from_step`: steps before it pay for a cache that fills, and say nothing.

    Raises:
        ValueError: figures that are not finite, not positive or out of order.
    """

    seconds: float
    low: float
    high: float
    stretches: int
    samples_per_second: float | None = None
    from_step: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.seconds <= self.high < math.inf:
            raise ValueError("the pace of the plan is out of order, not positive or not finite")


class Plan(Record, frozen=True):
    """The winning plan for one script on one device."""

    script: str
    arguments: tuple[str, ...]
    created: str
    device: str
    verdict: str
    fingerprint: Fingerprint
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    break_even_steps: float | None = None
    one_off_seconds: float = 0.0
    search_seconds: float = 0.0
    step_seconds: float | None = None
    proof: Proof | None = None
    kept: tuple[Kept, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    objective: str = "step"
    """What the plan makes smaller: `step`, or `time-to-target`, `cost` or `energy`; then it may change the training."""
    to_target: Interval | None = None
    """Time to the target, stock / planned, over seeds; None where the objective is the step."""
    energy: Energy | None = None
    """Energy to the target; None where the objective is another."""
    pace: Pace | None = None
    """Step time of the plan itself; None where nothing was kept, or it was not timed long enough."""
    upshift: str = ""
    """The version that made the plan; empty: not known."""
    schema: int = SCHEMA

    @property
    def techniques(self) -> dict[str, dict[str, Setting]]:
        """Technique name -> settings, in the order in which they are applied."""
        return {item.name: dict(item.settings) for item in self.kept}
