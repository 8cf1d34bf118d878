"""The self-test: identical arms, planted gains and planted faults through the real decisions, on this machine, now."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from upshift.hardware import machine
from upshift.search.duel import ArmFailed, ArmPlan, Duel, Ended
from upshift.search.selftest.planted import Planting, Twins, planted, tiny, truth
from upshift.search.selftest.result import Identical, SelftestReport, Truth
from upshift.sites import Numerics
from upshift.sites.runner import Runner

#: Seconds of one decision about identical arms, and decisions after which a fresh process takes part.
DECISION_SECONDS, DECISIONS_A_PAIR = 1.5, 10
#: Seconds the arms of a planted gain and of a planted fault alternate.
GAIN_SECONDS, FAULT_SECONDS = 10.0, 3.0
#: The part of a round that is spent on identical arms, and the seconds of a round.
IDENTICAL_SHARE, ROUND_SECONDS = 0.4, 120.0
#: The script of all trials: its steps are short on every machine.
MODEL = ("--model", "mlp", "--batch-size", "128", "--accumulate", "2")

#: Name -> arguments that waste time in the reference arm only.
GAINS = {
    "3 % of the step spent asleep": "sleep:0.03",
    "3 % of the step spent on arithmetic": "arithmetic:0.03",
}

#: Name -> what the candidate arm does wrong.
FAULTS: dict[str, ArmPlan] = {
    "gradients 5 % too large": planted(fault="loss_scale", size=0.05),
    "one layer without a gradient": planted(fault="dropped_gradient", size=1.0),
    "half of the labels shuffled, from step 20 on": planted(fault="shuffled_labels", size=0.5, from_step=20),
}


class Selftest:
    """One self-test of about `seconds`."""

    def __init__(self, runner: Runner, seconds: float, say: Callable[[str], None], seed: int = 0) -> None:
        self._runner = runner
        self._seconds = seconds
        self._say = say
        self._seed = seed
        self._began = time.monotonic()
        self._identical = Identical()
        self._gains: list[Truth] = []
        self._faults: list[Truth] = []
        self._problems: list[str] = []
        self._pair_seconds = 0.0
        self._twins = Twins(self._duel)

    def run(self) -> SelftestReport:
        """Rounds of identical arms, gains and faults until the time is up or somebody interrupts."""
        interrupted = False
        try:
            self._round()
            while not self._problems and self._left() > max(ROUND_SECONDS / 2, 2 * self._pair_seconds + GAIN_SECONDS):
                self._round()
            self._same(self._left())
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self._twins.close()
        tried = {item.name for item in (*self._gains, *self._faults)}
        return SelftestReport(
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
            machine=machine.describe(),
            seconds=time.monotonic() - self._began,
            identical=self._identical,
            gains=tuple(self._gains),
            faults=tuple(self._faults),
            problems=tuple(self._problems),
            left_out=tuple(name for name in (*GAINS, *FAULTS) if name not in tried),
            interrupted=interrupted,
        )

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def _duel(self) -> Duel:
        self._seed += 1
        return Duel(Planting(self._runner), tiny(*MODEL), timeout=300.0, patience=600.0, seed=self._seed)

    def _round(self) -> None:
        self._same(min(self._seconds, ROUND_SECONDS) * IDENTICAL_SHARE)
        # Two processes that stand still still hold memory.
        self._twins.close()
        for name, plan in FAULTS.items():
            self._plant(name, (), plan, FAULT_SECONDS, self._faults, Numerics.ROUNDING)
        for name, waste in GAINS.items():
            # Time is all that differs, so the bits must be the same.
            self._plant(name, ("--waste", waste), planted(waste="none"), GAIN_SECONDS, self._gains, Numerics.BITWISE)

    def _plant(self, name: str, arguments: tuple[str, ...], plan: ArmPlan, seconds: float, into: list[Truth],
               numerics: Numerics) -> None:  # fmt: skip
        if self._problems or self._left() < self._pair_seconds + seconds:
            return
        self._say(f"planted: {name}")
        self._seed += 1
        found = truth(name, self._runner, tiny(*MODEL, *arguments), plan, seconds, numerics=numerics, seed=self._seed)
        into.append(found)
        if found.failure:
            self._problems.append(f"The trial of {name} could not be made: {found.failure}.")

    def _same(self, seconds: float) -> None:
        """Decide about identical arms for so many seconds."""
        if self._problems or seconds < DECISION_SECONDS + self._pair_seconds:
            return
        until = time.monotonic() + seconds
        taken = 0
        while time.monotonic() < until:
            if taken == DECISIONS_A_PAIR:
                self._twins.renew()
                taken = 0
            before = time.monotonic()
            try:
                decision, _ = self._twins.decide(DECISION_SECONDS)
            except (ArmFailed, Ended) as error:
                self._problems.append(f"Identical arms could not be compared: {error}.")
                return
            if not taken:
                self._pair_seconds = max(self._pair_seconds, time.monotonic() - before - DECISION_SECONDS)
            same = self._identical
            same = self._identical = msgspec.structs.replace(
                same,
                decisions=same.decisions + 1,
                faster=same.faster + (decision == "faster"),
                slower=same.slower + (decision == "slower"),
                pairs=same.pairs + (taken == 0),
                seconds=DECISION_SECONDS,
            )
            taken += 1
            self._say(f"identical arms: decisions {same.decisions}, false {same.faster + same.slower}")
