"""Screening: live techniques alternate inside one process; process techniques in two that pass a token.

Screening picks; only what is confirmed afterwards in fresh processes enters a plan (winner's curse).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from upshift.measure.paired import Sequential
from upshift.records import Pairing, Trial
from upshift.search.candidates import Candidate
from upshift.search.duel import Arm, ArmFailed, ArmPlan, Duel, Ended

Say = Callable[[str], None]

#: Steps before a process is timed.
WARM = 4


def outcome_of(decision: str) -> Any:
    """The outcome a decision of the sequential test stands for."""
    return {"faster": "faster", "slower": "slower"}.get(decision, "no change")


def words(pairing: Pairing | None, decision: str) -> str:
    """A decision with its figures."""
    if pairing is None:
        return "too few blocks to tell"
    figures = f"{pairing.ratio:.3f}x [{pairing.low:.3f}, {pairing.high:.3f}], {pairing.quads} quads"
    if decision == "faster":
        return f"faster: {figures}"
    if decision == "slower":
        return f"slower: {figures}"
    return f"inside the noise, or below 1 %: {figures}"


class LiveScreen:
    """One resident process in which live techniques are switched between steps."""

    def __init__(self, make: Callable[[], Duel], say: Say, base: ArmPlan | None = None) -> None:
        """
        Args:
            base: what the process starts with; its live techniques can be switched, the others stay.
        """
        self._make = make
        self._say = say
        self._base = dict(base or {})
        self.duel: Duel | None = None
        self.arm: Arm | None = None
        self.on: ArmPlan = dict(self._base)

    def _ready(self) -> tuple[Duel, Arm]:
        if self.duel is None or self.arm is None:
            self.duel = self._make()
            self.arm = self.duel.start(self._base)
            self.duel.go(self.arm, WARM)
            for name, settings in self.on.items():
                if name in self._base:
                    continue
                self.duel.ask(self.arm, {"kind": "plan", "name": name, "settings": settings}, "done")
        return self.duel, self.arm

    def close(self) -> None:
        """End the process."""
        if self.duel is not None:
            self.duel.close()
        self.duel = self.arm = None

    def drop(self, name: str) -> None:
        """Take a technique off again."""
        self.on.pop(name, None)
        if self.duel is not None and self.arm is not None:
            self.duel.ask(self.arm, {"kind": "plan", "name": name, "settings": None}, "done")

    def compare(self, without: list[str], with_: list[str], seconds: float) -> tuple[str, Pairing | None]:
        """Alternate two sets of techniques that are all in this process."""
        duel, arm = self._ready()
        return compare_live(duel, arm, without, with_, seconds)

    def tried(self, candidate: Candidate, seconds: float) -> Trial:
        """Try one candidate on top of what is on; it stays on if it is faster."""
        began = time.monotonic()
        reference = dict(self.on)
        plan = {**reference, candidate.name: candidate.settings}

        def trial(outcome: Any, reason: str, pairing: Pairing | None = None, failure: str = "") -> Trial:
            return Trial(
                name=candidate.label, candidate=plan, reference=reference, outcome=outcome, reason=reason,
                stage="screen", pairing=pairing, seconds=time.monotonic() - began, failure=failure,
            )  # fmt: skip

        for attempt in (0, 1):
            try:
                duel, arm = self._ready()
                before = len(arm.notes)
                done = duel.ask(arm, {"kind": "plan", "name": candidate.name, "settings": candidate.settings}, "done")
                failed = [
                    text
                    for kind, name, text in arm.notes[before:]
                    if name == candidate.name and kind in ("off", "failed")
                ]
                if failed:
                    return trial("failed", failed[0], failure=failed[0])
                if candidate.name not in done["acted"]:
                    self.drop(candidate.name)
                    why = done.get("effects", {}).get(candidate.name) or "nothing to act on"
                    return trial("no change", f"no effect: {why}")
                self._say(f"{candidate.label}: alternating")
                decision, pairing = compare_live(duel, arm, list(reference), list(plan), seconds)
                if decision == "faster":
                    self.on[candidate.name] = candidate.settings
                else:
                    self.drop(candidate.name)
                return trial(outcome_of(decision), words(pairing, decision), pairing)
            except Ended as ended:
                self.close()
                if attempt or ended.steps < 30:
                    return trial("not tried", f"{ended}: too few to time it")
            except ArmFailed as failed:
                self.close()
                return trial("failed", failed.reason, failure=failed.reason)
        return trial("not tried", "the script ends too soon to time it")


def compare_live(
    duel: Duel, arm: Arm, without: list[str], with_: list[str], seconds: float
) -> tuple[str, Pairing | None]:
    """ABBA of two sets of live techniques in one process."""
    steps, _ = duel.block_steps()
    message = duel.ask(
        arm,
        {"kind": "compare", "a": without, "b": with_, "seconds": seconds, "block": min(steps, 3) if steps > 1 else 1,
         "seed": duel.random.randrange(2**31)},
        "compared",
        timeout=seconds + duel.timeout,
    )  # fmt: skip
    found = message["pairing"]
    return message["decision"], None if found is None else msgspec.convert(found, Pairing)


def with_epochs(pairing: Pairing, a: Arm, b: Arm, steps_per_epoch: float | None) -> Pairing:
    """Charge what starting an epoch costs (workers, iterators) to every step of it.

    Robust estimators trim the first step of an epoch away; where epochs are short that cost is real.
    """
    if not steps_per_epoch:
        return pairing
    extra_a, extra_b = a.epoch_cost(), b.epoch_cost()
    if extra_a is None or extra_b is None:
        return pairing
    step_a, step_b = pairing.reference_step, pairing.candidate_step
    if min(step_a, step_b) <= 0:
        return pairing
    factor = (1 + extra_a / steps_per_epoch / step_a) / (1 + extra_b / steps_per_epoch / step_b)
    return msgspec.structs.replace(
        pairing,
        ratio=pairing.ratio * factor,
        low=pairing.low * min(factor, 1.0),
        high=pairing.high * max(factor, 1.0),
        method=pairing.method + ", epoch starts charged",
    )


def within_reach(pairing: Pairing, a: Arm, targets: frozenset[str]) -> Pairing:
    """Hold a speed-up to what the phases it acts on can give: no technique saves more than all of its own phase.

    Two processes can differ for reasons of their own (memory layout, a neighbour on one core); a technique that only
    touches the data or the optimizer cannot be credited with that.
    """
    if not targets or not targets <= {"data", "optimizer"}:
        return pairing
    steady = [index for index in a.seconds if index >= 4]
    total = sum(a.seconds[index] for index in steady)
    spent = sum((a.data[i] if "data" in targets else 0.0) + (a.optimizer[i] if "optimizer" in targets else 0.0)
                for i in steady)  # fmt: skip
    if total <= 0 or spent >= total:
        return pairing
    # A tenth and one per cent of slack: a phase ends where its calls return, its cache misses do not.
    reach = 1.0 / max(1.0 - (1.1 * spent / total + 0.01), 1e-3)
    if pairing.high <= reach:
        return pairing
    return msgspec.structs.replace(
        pairing,
        ratio=min(pairing.ratio, reach),
        # An interval wholly out of reach was not made by this technique, so it shows no gain at all.
        low=pairing.low if pairing.low <= reach else min(pairing.low, 1.0),
        high=reach,
        method=pairing.method + f", held to the {reach:.2f}x its phase allows",
    )


class ProcessScreen:
    """Process techniques: a resident reference, and a fresh process for every candidate."""

    def __init__(self, make: Callable[[], Duel], base: ArmPlan, say: Say, steps_per_epoch: float | None) -> None:
        self._make = make
        self._say = say
        self._steps_per_epoch = steps_per_epoch
        self.base = dict(base)
        self.duel: Duel | None = None

    def close(self) -> None:
        """End all processes."""
        if self.duel is not None:
            self.duel.close()
        self.duel = None

    def tried(self, candidate: Candidate, seconds: float) -> Trial:
        """Try one candidate against the base; it joins the base if it is faster."""
        began = time.monotonic()
        reference = dict(self.base)
        plan = {**reference, candidate.name: candidate.settings}

        def trial(outcome: Any, reason: str, pairing: Pairing | None = None, failure: str = "",
                  one_off: float = 0.0) -> Trial:  # fmt: skip
            return Trial(
                name=candidate.label, candidate=plan, reference=reference, outcome=outcome, reason=reason,
                stage="screen", pairing=pairing, seconds=time.monotonic() - began, failure=failure,
                one_off_seconds=one_off,
            )  # fmt: skip

        try:
            if self.duel is None:
                self.duel = self._make()
                self.duel.start(reference)
                self.duel.go(self.duel.arms[0], WARM)
            duel = self.duel
            self._say(f"{candidate.label}: starting a fresh process")
            b = duel.replace(1, plan) if len(duel.arms) > 1 else duel.start(plan)
            a = duel.arms[0]
            if candidate.name in b.no_effect() and not candidate.fills:
                return trial("no change", "no effect: " + b.no_effect()[candidate.name])
            duel.go(b, WARM + 2, timeout=duel.patience)
            if candidate.fills and self._steps_per_epoch:
                # Steady state begins when the cache is full: after one epoch.
                duel.go(b, int(self._steps_per_epoch) + 2, timeout=duel.patience)
            if a.steps < 12:
                duel.go(a, 8)
            one_off = one_off_seconds(a, b)

            def shown(sequential: Sequential, elapsed: float) -> None:
                self._say(f"{candidate.label}: {len(sequential.quads)} quads, {elapsed:.0f} s")

            decision, pairing = duel.fight(seconds, on_quad=shown)
            if candidate.name in b.no_effect():
                return trial("no change", "no effect: " + b.no_effect()[candidate.name])
            if pairing is not None:
                pairing = within_reach(with_epochs(pairing, a, b, self._steps_per_epoch), a, candidate.targets)
                if decision == "faster" and pairing.low <= 1.01:
                    decision = "no change"
            if decision == "faster":
                a.child.kill()
                b.number = 0
                duel.arms = [b]
                self.base = plan
            return trial(outcome_of(decision), words(pairing, decision), pairing, one_off=one_off)
        except Ended as ended:
            self.close()
            return trial("not tried", f"{ended}: too few to time it")
        except ArmFailed as failed:
            if failed.arm == 0:
                self.close()
            elif self.duel is not None and len(self.duel.arms) > 1:
                self.duel.arms[1].child.kill()
                self.duel.arms = self.duel.arms[:1]
            return trial("failed", failed.reason, failure=failed.reason)


def one_off_seconds(a: Arm, b: Arm) -> float:
    """What the candidate cost once: its first steps beyond its steady pace, less the same of the reference."""
    n = min(a.steps, b.steps)
    if n < 4:
        return 0.0

    def excess(arm: Arm) -> float:
        values = [arm.seconds[i] for i in sorted(arm.seconds)][:n]
        steady = sorted(values[n // 2 :])[len(values[n // 2 :]) // 2]
        return sum(value - steady for value in values)

    return max(excess(b) - excess(a), 0.0)
