"""What a run spends until its target: seconds, or joules. One search serves both.

A plan that changes no training is proven faster by its steps, which settles the seconds. It does not settle the
joules (more threads may be faster and need more), so there whole runs judge that plan, too.
"""

from __future__ import annotations

from typing import Literal, Protocol

from upshift.errors import EnvironmentError_
from upshift.measure.metrics import Metric
from upshift.records.quantity import Basis
from upshift.records.verification import Interval, Verification, WholeRun
from upshift.search.verify import Options, joules_to, reached
from upshift.units import seconds as in_seconds
from upshift.units import si


class Spent(Protocol):
    """How runs are compared until their target, and in which words."""

    less: Literal["faster", "less energy"]
    more: Literal["slower", "more energy"]
    lead: str
    """Before an amount: the target `after` 12 s, `for` 1.2 kJ."""
    once: str
    """What a figure of a single run rests on."""
    better: str
    """What a plan is that spends less: `sooner at the target`."""
    which: str
    """The same after a comma."""
    nothing: str
    """What no technique did; the target follows."""
    judges_start: bool
    """Whether whole runs decide about a plan that step times have already proven, too."""

    def to_target(self, run: WholeRun) -> float | None:
        """What it spent until the target; None where that is not known or not reached."""

    def whole(self, run: WholeRun) -> float:
        """What it spent in all."""

    def time(self, best: float, stock: WholeRun) -> float:
        """Seconds that a run like the best may take, for the budget."""

    def words(self, value: float) -> str:
        """An amount for people: `12.3 s`, `1.2 kJ`."""

    def ratio(self, found: Verification) -> Interval | None:
        """Stock / planned; None where it is not known."""

    def gain(self, ratio: str, low: str) -> str:
        """A plan that was shown to spend less, with the ratio and its 95 % bound."""


class Seconds:
    """Time to the target."""

    less: Literal["faster", "less energy"] = "faster"
    more: Literal["slower", "more energy"] = "slower"
    lead, once = "after", "one seed"
    better, which, nothing = "sooner at the target", "which is sooner", "was sooner at"
    judges_start = False

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def to_target(self, run: WholeRun) -> float | None:
        """Seconds."""
        return reached(run, self.metric)

    def whole(self, run: WholeRun) -> float:
        """Seconds."""
        return run.seconds

    def time(self, best: float, stock: WholeRun) -> float:
        """The best itself."""
        return best

    def words(self, value: float) -> str:
        """`12.3 s`."""
        return in_seconds(value)

    def ratio(self, found: Verification) -> Interval | None:
        """Of times to the target."""
        return found.target_speedup

    def gain(self, ratio: str, low: str) -> str:
        """In a clause."""
        return f"the target after {ratio} less time (at least {low} at 95 %)"


class Joules:
    """Energy to the target; `basis` says whether any word of it may be called measured."""

    less: Literal["faster", "less energy"] = "less energy"
    more: Literal["slower", "more energy"] = "more energy"
    lead = "for"
    judges_start = True

    def __init__(self, metric: Metric, basis: Basis) -> None:
        self.metric, self.basis = metric, basis
        self.once = f"one seed, {basis}"
        self.less_energy = f"less energy ({basis})"
        self.better = f"{self.less_energy} to the target"
        self.which = f"which needs {self.less_energy}"
        self.nothing = f"needed {self.less_energy} to"

    def to_target(self, run: WholeRun) -> float | None:
        """Joules."""
        return joules_to(run, self.metric)

    def whole(self, run: WholeRun) -> float:
        """Joules.

        Raises:
            EnvironmentError_: not known.
        """
        if run.joules is None:
            raise EnvironmentError_(
                "the energy of a whole run could not be read: a counter stood still or went away.",
                remedy="Compare times instead: --objective time-to-target.",
            )
        return run.joules

    def time(self, best: float, stock: WholeRun) -> float:
        """As long as the untouched script: a frugal run may be slow."""
        return stock.seconds

    def words(self, value: float) -> str:
        """`1.2 kJ`."""
        return si(value, "J")

    def ratio(self, found: Verification) -> Interval | None:
        """Of energies to the target."""
        return found.energy if found.energy is not None and found.energy.mean is not None else None

    def gain(self, ratio: str, low: str) -> str:
        """In a clause."""
        return f"{ratio} {self.less_energy} to the target, at least {low} at 95 %,"


def spent_by(options: Options) -> Spent:
    """Joules where there is a meter, else seconds."""
    metric = options.metric
    return Seconds(metric) if options.meter is None else Joules(metric, options.meter.basis)
