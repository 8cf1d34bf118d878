"""What was tried, and what came of it."""

from __future__ import annotations

import math
from typing import Literal

from upshift.records.finding import Finding
from upshift.records.measurement import Measurement
from upshift.records.quantity import Record
from upshift.records.verification import Energy, Verification

Rung = Literal["none", "update", "trajectory", "metric", "bitwise"]
Outcome = Literal[
    "faster",
    "slower",
    "fits",
    "less energy",
    "more energy",
    "no change",
    "failed",
    "not applicable",
    "not shown",
    "not tried",
]

#: Rungs of the proof in order of strength.
RUNGS: tuple[Rung, ...] = ("none", "update", "trajectory", "metric")

#: Windows of a band.
MOST_WINDOWS = 32


class Pairing(Record, frozen=True):
    """Two arms timed in alternation. `ratio` = reference step time / candidate step time (> 1 is faster).

    `low`/`high` are one-sided bounds at `level` each; `quads` is the number of ABBA blocks they rest on.
    `smallest` is the smallest gain (as a ratio - 1) this pairing could have told from noise.
    """

    ratio: float
    low: float
    high: float
    quads: int
    level: float = 0.99
    reference_step: float = 0.0
    candidate_step: float = 0.0
    smallest: float | None = None
    method: str = ""


class UpdateCheck(Record, frozen=True):
    """Parameter updates of one step in both arms (rung 1)."""

    step: int
    cosine: float
    norm_ratio: float
    relative_error: float
    noise: float | None = None
    """The same distance between the updates of two different mini-batches of the reference arm."""
    worst: str = ""
    worst_cosine: float = 1.0
    passed: bool = False


class Band(Record, frozen=True):
    """What the stock loss did in the confirmation, in windows of steps (0 is the first): what `run` is held against.

    `mean` of the loss over steps `first` to `first + length - 1`; `spread`: standard deviation of the loss of one step
    around its trend there; `between`: standard deviation from one seed to another, in the unit of the loss. `seeds`
    says whether `between` was measured, or is an allowance (see `measure/band.py`).

    Raises:
        ValueError: sizes that differ, no window or more than `MOST_WINDOWS`, windows out of order, figures that are
            not finite or negative where they cannot be.
    """

    first: tuple[int, ...]
    length: tuple[int, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    between: tuple[float, ...]
    seeds: Literal["allowed", "measured"] = "allowed"

    def __post_init__(self) -> None:
        count = len(self.first)
        if not 1 <= count <= MOST_WINDOWS:
            raise ValueError(f"a band has 1 to {MOST_WINDOWS} windows, this one {count}")
        if any(len(column) != count for column in (self.length, self.mean, self.spread, self.between)):
            raise ValueError("the columns of the band differ in size")
        if min(self.first) < 0 or min(self.length) < 1:
            raise ValueError("a window of the band begins before the first step or holds none")
        if any(a + n > b for a, n, b in zip(self.first, self.length, self.first[1:], strict=False)):
            raise ValueError("the windows of the band overlap or are out of order")
        if not all(map(math.isfinite, (*self.mean, *self.spread, *self.between))):
            raise ValueError("the band has a figure that is not finite")
        if min(*self.spread, *self.between) < 0.0:
            raise ValueError("a spread of the band is negative")

    @property
    def horizon(self) -> int:
        """Steps from the beginning of training that the band reaches to."""
        return self.first[-1] + self.length[-1]


class Proof(Record, frozen=True):
    """What was shown about quality: the rung reached, and how fine the evidence is.

    `lag` is how many more steps (fraction) the candidate needs for the same loss; `lag_high` its one-sided
    upper bound; `smallest_lag` the smallest lag these steps could have shown. `steps` is the horizon.
    """

    rung: Rung
    passed: bool
    reason: str
    steps: int = 0
    lag: float | None = None
    lag_high: float | None = None
    smallest_lag: float | None = None
    updates: tuple[UpdateCheck, ...] = ()
    bitwise: bool | None = None
    weaker: str = ""
    """Why the proof is weaker than usual (flat loss, two optimizers), empty where it is not."""
    stock_losses: tuple[float, ...] = ()
    planned_losses: tuple[float, ...] = ()
    band: Band | None = None
    no_band: str = ""
    """Why there is no band, empty where there is one."""


class Trial(Record, frozen=True):
    """One candidate against one reference."""

    name: str
    candidate: dict[str, dict[str, bool | int | float | str]]
    reference: dict[str, dict[str, bool | int | float | str]]
    outcome: Outcome
    reason: str
    stage: Literal["check", "screen", "confirm", "attribution"]
    pairing: Pairing | None = None
    proof: Proof | None = None
    seconds: float = 0.0
    one_off_seconds: float = 0.0
    failure: str = ""


class Fitted(Record, frozen=True):
    """A plan under a limit of memory that the untouched script exceeds. Bytes, all measured; None: not known.

    `held` of the plan, or of what needed the least where nothing fits (`plan` says which); `script` of the untouched
    script, None where it ran out of memory. `against`: what quality and speed were compared with; empty: the script.
    `untried`: plans that the budget had no time for, where nothing fits.
    """

    limit: int
    held: int | None
    script: int | None
    plan: str = ""
    fits: bool = True
    against: str = ""
    untried: int = 0


class TuneReport(Record, frozen=True):
    """Everything a search saw and decided, so that it can be drawn again without running anything."""

    script: str
    arguments: tuple[str, ...]
    created: str
    measurement: Measurement
    findings: tuple[Finding, ...]
    trials: tuple[Trial, ...]
    verdict: str
    plan_file: str
    kept: tuple[str, ...]
    seconds: float
    budget: float
    forecast: str = ""
    isolation: str = ""
    interrupted: bool = False
    final: Pairing | None = None
    proof: Proof | None = None
    objective: str = "step"
    """What was to become smaller: the time of a `step`, the `time-to-target`, the `cost`, the `energy`."""
    verification: Verification | None = None
    """The whole runs that decided about techniques that change the training."""
    cost: str = ""
    """What steps and the search cost, where a price was given."""
    energy: Energy | None = None
    """What the energy rests on, and how much less it is, where whole runs decided by it."""
    fitted: Fitted | None = None
    """What the plan and the script need, where memory was limited and the script needs more."""
    schema: int = 1
