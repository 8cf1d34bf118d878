"""Under a limit of memory that the script itself exceeds: the fastest plan that fits.

Each plan is tried in a fresh process of its own, for a few steps: the most bytes it held, and the time of a step. First
the script as it is; then every technique that saves memory alone; then combinations of those that did, those that are
predicted to fit first, the cheapest first, else the least seconds per byte saved. Step times of different processes
differ by the mood of the machine, so plans that lie close together alternate before one is called the faster.

Where the script itself runs out of memory nothing is known of it: costs then count from the fastest plan that ran.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from upshift.records import Trial
from upshift.records.trial import Outcome
from upshift.search.candidates import Candidate, conflicting
from upshift.search.duel import ArmFailed, ArmPlan, Duel, Ended
from upshift.sites import Technique
from upshift.units import binary, ratio
from upshift.units import seconds as in_words

#: Steps of a probe: what an optimizer allocates is there after the first, and a median needs some; slow ones fewer.
STEPS, LEAST_STEPS, PROBE_SECONDS = 12, 4, 15.0

#: Plans whose steps differ by less than this factor are compared side by side.
CLOSE = 1.15

#: A combination is tried if it is predicted to need no more than this factor of the limit: savings overlap, or add up.
HOPE = 1.25

#: The largest combination, and how many are tried.
MOST_TOGETHER, MOST_COMBINATIONS = 3, 6

#: What the words of a process that died say where memory was the reason.
_SAYINGS = (
    "OutOfMemoryError",
    "MemoryError",
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "killed by signal 9",
    "exit code -9",
    "_STATUS_ALLOC_FAILED",
)


def out_of_memory(text: str) -> bool:
    """Whether the last words of a process (its error, or the signal that ended it) say that memory ran out."""
    return any(saying in text for saying in _SAYINGS)


@dataclass(frozen=True)
class Probe:
    """A plan that was tried for a few steps: most bytes held and seconds a step; both None where it died, and why."""

    plan: ArmPlan
    label: str = ""
    held: int | None = None
    step: float | None = None
    why: str = ""

    @property
    def starved(self) -> bool:
        """Whether it died for want of memory."""
        return self.held is None and out_of_memory(self.why)


@dataclass
class Fit:
    """What came of it. `fits`: plans within the limit, the fastest first; `least`: what needs the least of all.

    `untried`: plans for which the budget had no time, while nothing fitted.
    """

    limit: int
    stock: Probe
    fits: list[Probe] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    untried: int = 0

    @property
    def script_fits(self) -> bool:
        """Whether the untouched script is within the limit."""
        return self.stock.held is not None and self.stock.held <= self.limit

    @property
    def least(self) -> Probe | None:
        """What needs the least memory of all that ran; None where nothing did."""
        ran = [probe for probe in (self.stock, *self.probes) if probe.held is not None]
        return min(ran, key=lambda probe: probe.held or 0, default=None)


class Fitting:
    """Looks for plans that fit."""

    def __init__(
        self,
        make: Callable[[], Duel],
        limit: int,
        techniques: Mapping[str, Technique],
        step: float,
        *,
        say: Callable[[str], None],
        add: Callable[[Trial], object],
        time_for: Callable[[float, bool], bool],
    ) -> None:
        """
        Args:
            limit: bytes.
            step: seconds a step of the script is known to take; decides how many steps a probe makes.
            add: told of every plan tried.
            time_for: whether the budget has room for so many seconds, and for a confirmation behind them if that is
                asked for: while nothing fits there is nothing to confirm, and the first plan that does comes first.
        """
        self._make = make
        self._limit = limit
        self._techniques = dict(techniques)
        self._steps = int(min(max(PROBE_SECONDS / max(step, 1e-6), LEAST_STEPS), STEPS))
        self._say, self._add, self._time_for = say, add, time_for
        self._spent = 0.0

    def search(self, found: Iterable[Candidate]) -> Fit:
        """Try the script, then plans of these candidates, of which only those that save memory count."""
        fit = Fit(self._limit, self._probe({}, "the untouched script"))
        if fit.script_fits or (fit.stock.held is None and not fit.stock.starved):
            return fit
        self._say(f"{self.needs(fit.stock)}: looking for the fastest plan that fits")
        singles = [item for item in found if saves_memory(item, self._techniques)]
        for item in singles:
            # Until something fits, the time of one more probe is kept for the combination that promises most.
            self._try(fit, {item.name: item.settings}, item.label, after=1 if len(singles) > 1 and not fit.fits else 0)
        for plan, label in self._combinations(fit, singles):
            self._try(fit, plan, label)
        fit.fits.sort(key=lambda probe: probe.step or 0.0)
        self._settle(fit)
        return fit

    def needs(self, probe: Probe) -> str:
        """`the untouched script needs 12 GiB (measured), --fit allows 8 GiB`."""
        if probe.held is None:
            return f"{probe.label} runs out of memory here"
        return f"{probe.label} needs {binary(probe.held)} (measured), --fit allows {binary(self._limit)}"

    # -- trying --------------------------------------------------------------------------------------------------

    def _probe(self, plan: ArmPlan, label: str) -> Probe:
        self._say(f"memory of {label}: starting a fresh process")
        began = time.monotonic()
        duel = self._make()
        try:
            arm = duel.start(plan)
            try:
                duel.go(arm, self._steps, timeout=duel.patience)
            except Ended:
                pass  # what was seen of a short script stands
            idle = arm.no_effect()
            if idle:
                name, text = next(iter(idle.items()))
                return Probe(plan, label, why=f"no effect: {name}: {text}")
            return Probe(plan, label, duel.held(arm), duel.step(0))
        except ArmFailed as failed:
            return Probe(plan, label, why=failed.reason)
        except Ended as ended:
            return Probe(plan, label, why=str(ended))
        finally:
            duel.close()
            self._spent = max(self._spent, time.monotonic() - began)

    def _try(self, fit: Fit, plan: ArmPlan, label: str, after: int = 0) -> None:
        """Try a plan, if the budget has room for it and `after` more."""
        if not self._time_for((1 + after) * self._spent, bool(fit.fits)):
            known = "a plan that fits is known" if fit.fits else "no time is left for it"
            self._add(_trial(plan, label, "not tried", f"{known}; a larger --budget tries more"))
            fit.untried += not fit.fits
            return
        probe = self._probe(plan, label)
        fit.probes.append(probe)
        if probe.held is None or probe.step is None:
            self._add(_trial(plan, label, "failed", probe.why))
            return
        slower = "" if fit.stock.step is None else f", {_against(probe.step / fit.stock.step)}"
        if probe.held > self._limit:
            self._add(_trial(plan, label, "failed", f"{self.needs(probe)[len(label) + 1 :]}{slower}"))
            return
        fit.fits.append(probe)
        self._add(
            _trial(plan, label, "fits", f"needs {binary(probe.held)} (measured), {in_words(probe.step)} a step{slower}")
        )

    def _combinations(self, fit: Fit, singles: Sequence[Candidate]) -> list[tuple[ArmPlan, str]]:
        """Combinations worth trying, in order."""
        alone = {probe.label: probe for probe in fit.probes}
        ran = [probe for probe in fit.probes if probe.held is not None and probe.step is not None]
        base = fit.stock.held or max((probe.held or 0 for probe in ran), default=0)
        quickest = fit.stock.step or min((probe.step or 0.0 for probe in ran), default=0.0)
        best = min((probe.step or 0.0 for probe in fit.fits), default=None)
        worth: list[tuple[tuple[bool, float], ArmPlan, str]] = []
        for count in range(2, MOST_TOGETHER + 1):
            for items in itertools.combinations(singles, count):
                plan = {item.name: item.settings for item in items}
                probes = [alone.get(item.label) for item in items]
                known = [probe for probe in probes if probe is not None and (probe.held is not None or probe.starved)]
                if len(plan) < count or len(known) < count:
                    continue
                if any(conflicting(name, plan, self._techniques) for name in plan):
                    continue
                label = " + ".join(item.label for item in items)
                costs = [(probe.step or quickest) - quickest for probe in known]
                step = quickest + sum(costs)
                if best is not None and step >= best:
                    continue
                if fit.stock.held is None or any(probe.held is None for probe in known):
                    worth.append(((True, step), plan, label))
                    continue
                saved = [base - (probe.held or 0) for probe in known]
                held = base - sum(saved)
                if min(saved) <= 0 or (held > HOPE * self._limit and fit.fits):
                    continue
                fits = held <= self._limit
                worth.append(((not fits, step if fits else sum(costs) / sum(saved)), plan, label))
        worth.sort(key=lambda item: item[0])
        return [(plan, label) for _, plan, label in worth[:MOST_COMBINATIONS]]

    def _settle(self, fit: Fit) -> None:
        """Plans that are close together alternate; the fastest comes first."""
        place = 1
        while place < len(fit.fits):
            first, other = fit.fits[0], fit.fits[place]
            place += 1
            if (other.step or 0.0) > CLOSE * (first.step or 0.0) or not self._time_for(2 * self._spent, True):
                continue
            if self._faster(first, other):
                fit.fits.remove(other)
                fit.fits.insert(0, other)

    def _faster(self, first: Probe, other: Probe) -> bool:
        """Whether `other` is faster than `first` where both alternate."""
        self._say(f"{other.label} against {first.label}")
        duel = self._make()
        try:
            for probe in (first, other):
                duel.go(duel.start(probe.plan), LEAST_STEPS, timeout=duel.patience)
            decision, _ = duel.fight(max(self._spent / 2, 4.0))
            return decision == "faster"
        except (ArmFailed, Ended):
            return False  # two at once may be too much for the machine
        finally:
            duel.close()


def saves_memory(item: Candidate, techniques: Mapping[str, Technique]) -> bool:
    """Whether a candidate may take part in making a plan fit: by its card, or since its numbers are half as wide."""
    card = techniques[item.name].card
    return card.saves_memory or card.precision == "bfloat16"


def _against(factor: float) -> str:
    """`1.30x the script's time a step`."""
    return f"{ratio(factor)} the script's time a step"


def _trial(plan: ArmPlan, label: str, outcome: Outcome, reason: str) -> Trial:
    return Trial(name=label, candidate=dict(plan), reference={}, outcome=outcome, reason=reason, stage="screen")
