"""The long proof: whole runs of stock and plan, and what the user's own metric says."""

from __future__ import annotations

from typing import Literal

from upshift.records.quantity import Basis, Record

Arm = Literal["stock", "plan"]
Answer = Literal["as good", "worse", "not shown"]


class WholeRun(Record, frozen=True):
    """One run of the whole script. `values` are (seconds since the start of the process, value of the metric)."""

    arm: Arm
    seed: int
    seconds: float
    code: int
    values: tuple[tuple[float, float], ...] = ()
    steps: int = 0
    notes: tuple[str, ...] = ()
    """What the guard or a technique said."""
    joules: float | None = None
    """Energy of the whole run; None where it was not asked for or not known."""


class Interval(Record, frozen=True):
    """A mean over seeds with one-sided bounds at `level` each; None where it is not known."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    level: float = 0.95


class Energy(Interval, frozen=True, kw_only=True):
    """Energy to the target, stock / planned. A run's is the time to its target times its mean power.

    `how` says what was read, or what an estimate rests on. `stock` and `plan`: mean joules to the target.
    """

    basis: Basis
    how: str
    stock: float | None = None
    plan: float | None = None


class Verification(Record, frozen=True):
    """Stock against plan on the user's metric.

    `difference` is plan minus stock in the metric's unit, signed so that more is better. `speedup` and
    `target_speedup` are stock time / planned time (whole process; first time the target was seen).
    """

    script: str
    arguments: tuple[str, ...]
    created: str
    metric: str
    mode: Literal["max", "min"]
    techniques: dict[str, dict[str, bool | int | float | str]]
    fingerprint: str
    """Of script, arguments, device, versions and settings: runs of another one are not taken up again."""
    seeds: int
    margin: float
    margin_note: str
    answer: Answer
    reason: str
    runs: tuple[WholeRun, ...] = ()
    stock: Interval | None = None
    plan: Interval | None = None
    difference: Interval | None = None
    speedup: Interval | None = None
    target: float | None = None
    target_speedup: Interval | None = None
    reached: tuple[int, int] = (0, 0)
    """Runs of stock and plan that reached the target."""
    seed_spread: float | None = None
    """Standard deviation of the stock metric over seeds."""
    price: float | None = None
    """Per hour, in the user's currency."""
    take: Literal["last", "best"] = "last"
    energy: Energy | None = None
    """None where energy was not asked for."""
    schema: int = 1
