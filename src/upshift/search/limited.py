"""The end of a search under a limit of memory that the script exceeds: what is confirmed, against what, and said.

The plan that fits is confirmed against the untouched script, which may need more than the limit as long as the machine
has it; it must be as good, and may be slower. What makes it faster stays only if that is seen once more, in two fresh
processes, against the plan that fits. Where the script itself runs out of memory another plan that fits stands for it,
one that changes no bit and saves memory in another way where there is one; the speed-up over the script is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from upshift.records import Proof, Trial
from upshift.records.trial import Fitted, Outcome, Pairing
from upshift.search.confirm import UPDATE_STEPS, Confirmation
from upshift.search.duel import ArmFailed, ArmPlan, Duel, Ended, TooLarge
from upshift.search.fitting import LEAST_STEPS, Fit, Probe
from upshift.search.screening import outcome_of
from upshift.sites import Numerics
from upshift.units import binary, ratio

#: Confirmations that are tried: a plan may turn out too large, or not as good.
MOST = 4

#: Shares of the time for what is on top of the plan that fits, and for the confirmation.
ON_TOP = 0.3


class Limited:
    """What is left to do once plans that fit are known."""

    def __init__(
        self,
        fit: Fit,
        make: Callable[[], Duel],
        confirm: Callable[[ArmPlan, ArmPlan | None, float], Confirmation],
        kinds: Callable[[ArmPlan], Mapping[str, Numerics]],
        riskiest: Callable[[ArmPlan], str],
        *,
        say: Callable[[str], None],
        add: Callable[[Trial], object],
    ) -> None:
        """
        Args:
            confirm: a plan against another (None: the untouched script) for so many seconds; raises ArmFailed.
            kinds: what each technique of a plan does to the numbers.
            riskiest: which technique of a plan is the first to be left out.
        """
        self._fit, self._make, self._confirm, self._kinds, self._riskiest = fit, make, confirm, kinds, riskiest
        self._say, self._add = say, add
        self._fits = list(fit.fits)
        self._against = ""
        self.dropped: dict[str, str] = {}

    @property
    def lean(self) -> ArmPlan:
        """What must be in the plan so that it fits; empty where nothing fits."""
        return dict(self._fits[0].plan) if self._fits else {}

    # -- confirmation --------------------------------------------------------------------------------------------

    def confirmed(self, plan: ArmPlan, seconds: float) -> tuple[ArmPlan, Confirmation | None]:
        """The plan that may be kept and what it rests on; an empty one where none may.

        Args:
            plan: the plan that fits with what was faster on top of it when screened.
        """
        if plan != self.lean:
            plan = self._with_what_fits(plan)
        if plan != self.lean and not self._adds(plan, ON_TOP * seconds):
            for name in plan.keys() - self.lean.keys():
                self.dropped[name] = "faster when screened, not confirmed on top of the plan that fits"
            plan = self.lean
        last: Confirmation | None = None
        for _ in range(MOST):
            if not plan:
                break
            stands_in = self._stands_in(plan)
            if self._fit.stock.held is None and stands_in is None:
                return self._uncompared(plan, "no other plan fits that it could be compared with")
            self._against = stands_in.label if stands_in is not None else ""
            try:
                last = self._confirm(plan, stands_in.plan if stands_in is not None else None, seconds)
            except ArmFailed as failed:
                self._add(_trial(plan, "failed", failed.reason))
                if isinstance(failed, TooLarge) and plan == self.lean:
                    self._fit.fits.remove(self._fits[0])
                if failed.arm == 0 or (plan == self.lean and not isinstance(failed, TooLarge)):
                    return self._uncompared(plan, failed.reason)
                plan = self._smaller(plan, failed.reason, failed.techniques)
                continue
            good = last.proof.passed
            self._add(_trial(plan, "fits" if good else "not shown", "" if good else last.proof.reason, last))
            if good:
                return plan, self._labelled(last)
            plan = self._smaller(plan, last.proof.reason, ())
        return {}, last

    def _smaller(self, plan: ArmPlan, reason: str, named: tuple[str, ...]) -> ArmPlan:
        """The next plan to confirm: without something on top, else the next one that fits; empty at the end."""
        extra = {name: settings for name, settings in plan.items() if name not in self.lean}
        if extra:
            out = {name for name in named if name in extra} or {self._riskiest(extra)}
            self.dropped |= dict.fromkeys(out, reason)
            return {name: settings for name, settings in plan.items() if name not in out}
        self._fits.pop(0)
        return self.lean

    def _with_what_fits(self, plan: ArmPlan) -> ArmPlan:
        """The plan without what alone is too much on top of the plan that fits. Screening inside one process cannot
        tell: what a process held at most says nothing about what was switched on when."""
        found = self.lean
        for name in [name for name in plan if name not in found]:
            held = self._held({**self.lean, name: plan[name]})
            if held is None or held > self._fit.limit:
                needs = "it died" if held is None else f"needs {binary(held)} (measured)"
                self.dropped[name] = f"{needs} on top of the plan that fits, --fit allows {binary(self._fit.limit)}"
            else:
                found[name] = plan[name]
        return found

    def _held(self, plan: ArmPlan) -> int | None:
        """The most bytes a plan holds in a few steps; None where it dies."""
        duel = self._make()
        try:
            arm = duel.start(plan)
            duel.go(arm, LEAST_STEPS, timeout=duel.patience)
            return duel.held(arm)
        except (ArmFailed, Ended):
            return None
        finally:
            duel.close()

    def _adds(self, plan: ArmPlan, seconds: float) -> bool:
        """Whether what is on top of the plan that fits makes it faster, in two fresh processes."""
        self._say(f"{' + '.join(plan)} against the plan that fits")
        duel = self._make()
        try:
            duel.start(self.lean)
            duel.start(plan)
            duel.level(UPDATE_STEPS)
            decision, pairing = duel.fight(max(seconds, 6.0))
        except (ArmFailed, Ended) as problem:
            self._add(_trial(plan, "failed", str(problem), reference=self.lean))
            return False
        finally:
            duel.close()
        trial = _trial(plan, outcome_of(decision), "against the plan that fits", reference=self.lean)
        self._add(msgspec.structs.replace(trial, pairing=pairing))
        return decision == "faster"

    def _stands_in(self, plan: ArmPlan) -> Probe | None:
        """What stands for the script where it cannot run: exact, and as unlike the plan as can be had."""
        if self._fit.stock.held is not None:
            return None
        exact = [
            probe
            for probe in self._fit.fits
            if probe.plan != plan and all(kind is Numerics.BITWISE for kind in self._kinds(probe.plan).values())
        ]
        return min(exact, key=lambda probe: len(probe.plan.keys() & plan.keys()), default=None)

    def _uncompared(self, plan: ArmPlan, reason: str) -> tuple[ArmPlan, Confirmation]:
        """The plan that fits, where nothing could be run beside it: kept only if it changes no bit by its make."""
        plan = self.lean
        exact = bool(plan) and all(kind is Numerics.BITWISE for kind in self._kinds(plan).values())
        proof = Proof(rung="none", passed=False, reason=f"it could not be compared: {reason}")
        held = self._fits[0].held or 0
        return (plan if exact else {}), Confirmation("no change", None, proof, held=held)

    def _labelled(self, found: Confirmation) -> Confirmation:
        """The confirmation; where another plan stood for the script its proof says so."""
        if not self._against:
            return found
        said = f"compared with {self._against}, since the untouched script runs out of memory here"
        weaker = "; ".join(text for text in (found.proof.weaker, said) if text)
        proof = msgspec.structs.replace(found.proof, weaker=weaker)
        return replace(found, proof=proof)

    # -- what is said --------------------------------------------------------------------------------------------

    def fitted(self, plan: ArmPlan, confirmation: Confirmation | None) -> Fitted:
        """The record of it."""
        limit, script = self._fit.limit, self._fit.stock.held
        if not self._fit.fits:
            least = self._fit.least
            held, label = (None, "") if least is None else (least.held, least.label)
            return Fitted(limit, held, script, plan=label, fits=False, untried=self._fit.untried)
        probe = (self._fits or self._fit.fits)[0]
        held = max(probe.held or 0, confirmation.held if confirmation is not None and plan else 0)
        names = " + ".join(plan) or probe.label
        return Fitted(limit, held, script, plan=names, against=self._against)


def verdict(found: Fitted, kept: bool, pairing: Pairing | None, proof: Proof | None, interrupted: bool) -> str:
    """What is said of a search under a limit that the script exceeds."""
    limit = binary(found.limit)
    script = f"needs {binary(found.script)}" if found.script is not None else "runs out of memory here"
    if not found.fits:
        plans = "one plan" if found.untried == 1 else f"{found.untried} plans"
        more = f" The budget had no time for {plans}: a larger --budget tries more." if found.untried else ""
        tried = "Nothing that was tried fits" if found.untried else "Nothing fits"
        if found.held is None:
            return f"{tried} in {limit}: the untouched script {script}, and so does every plan tried.{more}"
        return (
            f"{tried} in {limit}: the least was {binary(found.held)} with {found.plan} (measured peak); the "
            f"untouched script {script}.{more}"
        )
    held = f"fits in {limit} (measured peak {binary(found.held)})" if found.held is not None else f"fits in {limit}"
    if interrupted:
        return f"Interrupted before anything was confirmed: {found.plan} {held}; tune --resume goes on from here."
    if not kept:
        why = proof.reason if proof is not None else "it was not confirmed"
        return f"{found.plan} {held}, but is not kept, since its result was not shown to be as good: {why}."
    shown = ""
    if proof is not None and proof.passed:
        shown = f" Quality shown to rung '{proof.rung}' over {proof.steps} steps."
        shown += f" The proof is weaker than usual: {proof.weaker}." if proof.weaker else ""
    elif proof is not None:
        shown = f" It changes no bit by its make, but {proof.reason}; upshift run --require none uses it."
    return f"{found.plan}: {held}, {_speed(found, pairing)}.{shown}"


def _speed(found: Fitted, pairing: Pairing | None) -> str:
    if found.script is None or found.against or pairing is None:
        why = "which runs out of memory here" if found.script is None else "which was not run beside it"
        return f"how much slower than the untouched script, {why}, is unknown"
    script = f"the untouched script, which needs {binary(found.script)}"
    bounds = f"{pairing.quads} quads, at {pairing.level:.0%}"
    if pairing.high < 1.0:
        within = f"{ratio(1 / pairing.high)} to {ratio(1 / pairing.low)}"
        return f"{ratio(1 / pairing.ratio)} slower than {script} ({within}, {bounds})"
    if pairing.low > 1.0:
        return f"{ratio(pairing.ratio)} faster than {script} (at least {ratio(pairing.low)}, {bounds})"
    within = f"{ratio(pairing.low)} to {ratio(pairing.high)} of its speed"
    return f"as fast as {script}, as far as the noise lets tell ({within}, {bounds})"


def _trial(plan: ArmPlan, outcome: Outcome, reason: str, found: Confirmation | None = None,
           reference: ArmPlan | None = None) -> Trial:  # fmt: skip
    made = Trial(
        name=" + ".join(plan), candidate=dict(plan), reference=dict(reference or {}), outcome=outcome,
        reason=reason, stage="confirm",
    )  # fmt: skip
    if found is None:
        return made
    return msgspec.structs.replace(made, pairing=found.pairing, proof=found.proof)
