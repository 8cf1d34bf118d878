"""The search: diagnose's order, screening, confirmation, attribution, inside a budget.

Only what was confirmed in two fresh processes enters the plan. "Keep your baseline" is an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from upshift.measure.paired import LEAST_QUADS
from upshift.records import Measurement, Pairing, Trial
from upshift.search.candidates import (
    DEFAULT_BUDGET,
    Candidate,
    affordable,
    candidates,
    conflicting,
    forecast,
    promised,
)
from upshift.search.concluding import Outcome, break_even, kept, rejected, said, steps_per_epoch
from upshift.search.confirm import Confirmation, confirm
from upshift.search.duel import ArmFailed, ArmPlan, Duel
from upshift.search.fitting import Fitting
from upshift.search.limited import Limited, verdict
from upshift.search.screening import LiveScreen, ProcessScreen
from upshift.sites import Numerics, Technique
from upshift.sites.risk import COARSE, RISK, suspicion
from upshift.sites.runner import ChildSpec, Runner
from upshift.units import seconds as in_words

#: Shares of the budget.
LIVE_SHARE, PROCESS_SHARE, CONFIRM_SHARE, ATTRIBUTION_SHARE = 0.25, 0.30, 0.30, 0.10

#: The least seconds of a live trial; what a compiler is expected to take before the first step.
LIVE_SECONDS, PREPARING = 4.0, 25.0

#: A predicted speed-up from which a process trial comes first, however cheap the live ones are.
MUCH = 2.0

#: A ratio from which a trial that could not tell is worth the rest of the time.
PROMISING = 1.03

#: Why a trial is not made although time is left.
KEPT = "what is left of the budget is kept for the confirmation; a larger --budget buys this trial"


@dataclass
class Options:
    """What the person asked for."""

    budget: float = DEFAULT_BUDGET
    only: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    untested: bool = False
    steps_planned: int | None = None
    timeout: float = 60.0
    seed: int = 0
    fit: int | None = None
    """Bytes the plan may hold."""
    child: dict[str, object] = field(default_factory=dict)


class Autopilot:
    """Searches a plan for one script on this machine."""

    def __init__(
        self,
        runner: Runner,
        base: ChildSpec,
        seen: Measurement,
        techniques: Mapping[str, Technique],
        options: Options,
        say: Callable[[str], None],
        on_trial: Callable[[Trial], None] = lambda trial: None,
        earlier: tuple[Trial, ...] = (),
        predicted: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            base: target, arguments and options every child shares.
            seen: the diagnosis.
            say: told what is going on, for the progress line.
            on_trial: told of every trial as it ends.
            predicted: technique -> speed-up the diagnosis predicts; orders the trials.
            earlier: trials of an interrupted search of the same script, not to be repeated.
        """
        self.runner = runner
        self.base = base
        self.seen = seen
        self.techniques = dict(techniques)
        self.options = options
        self.say = say
        self.on_trial = on_trial
        self.earlier = {
            (trial.name, str(sorted(trial.reference))): trial for trial in earlier if trial.stage == "screen"
        }
        self.predicted = dict(predicted or {})
        self.trials: list[Trial] = []
        self.began = time.monotonic()
        self.step = max(seen.anatomy.step.or_else(0.05), 1e-4)
        self.startup = seen.anatomy.startup.or_else(5.0) + 2.0
        self.steps_per_epoch = steps_per_epoch(seen)
        self.planned = options.steps_planned or seen.facts.steps_total
        self._seed = options.seed
        self._dropped: dict[str, str] = {}
        self._too_short = ""
        self._final: ArmPlan = {}
        self._limited: Limited | None = None

    # -- helpers -------------------------------------------------------------------------------------------------

    def _duel(self) -> Duel:
        self._seed += 1
        base = msgspec.structs.replace(self.base, seed=self.options.seed)
        patience = max(180.0, 6 * self.startup + 20 * self.step)
        timeout = max(self.options.timeout, 60 * self.step)
        return Duel(self.runner, base, timeout=timeout, patience=patience, seed=self._seed,
                    fit=self.options.fit)  # fmt: skip

    def _left(self) -> float:
        return self.options.budget - (time.monotonic() - self.began)

    def _reserve(self) -> float:
        """What the confirmation needs: two start-ups, the updates of the first steps, and a few quads."""
        return 2 * self.startup + (24 + LEAST_QUADS * 4) * self.step + 10.0

    def _add(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        self.on_trial(trial)
        return trial

    def _remaining_seconds(self) -> float | None:
        return None if self.planned is None else self.planned * self.step

    def _pays(self, candidate: Candidate, cost: float) -> str:
        """Why a trial would not pay for itself over the training that remains, or the empty string.

        The prediction is taken at its word; where there is none, or less, 10 % are expected, since a trial ends as
        soon as it excludes a gain.
        """
        remaining = self._remaining_seconds()
        if remaining is None:
            return ""
        expected = remaining * (1.0 - 1.0 / max(candidate.gain, 1.10))
        if expected >= cost:
            return ""
        return (
            f"would not pay: it could save about {in_words(expected)} of the {in_words(remaining)} planned, "
            f"the trial costs {in_words(cost)}; --steps-planned N says if more is planned"
        )

    def _skipped(self, candidate: Candidate, reason: str, base: ArmPlan) -> None:
        self._add(
            Trial(name=candidate.label, candidate={**base, candidate.name: candidate.settings}, reference=dict(base),
                  outcome="not tried", reason=reason, stage="screen")
        )  # fmt: skip

    def limit(self, spent: float) -> str:
        """Lower the default budget to what this training can pay back; says so where it did.

        Args:
            spent: seconds the diagnosis took, which the budget includes.
        """
        self.options.budget = max(DEFAULT_BUDGET - spent, 20.0)
        planned = self._remaining_seconds()
        if planned is None:
            return ""
        saved = promised(self._candidates()[0], planned)
        trials = 2 * (self.startup + 24 * self.step + 6.0)
        budget = affordable(saved, spent, self._reserve() + trials)
        may_gain = f"training is planned for about {in_words(planned)} and may gain {in_words(saved)}"
        if budget is None:
            self._too_short = (
                f"{may_gain}: too little to pay for a search (--budget or --steps-planned searches anyway)"
            )
            return self._too_short
        self.options.budget = max(budget - spent, 20.0)
        if budget >= DEFAULT_BUDGET:
            return ""
        return f"{may_gain}: the search is limited to {in_words(budget)} (--budget or --steps-planned changes that)"

    def plan_ahead(self) -> str:
        """What would be tried, in which order, and what it would cost (`--dry-run`)."""
        found, refused = self._candidates()
        live = sum(item.live for item in found)
        lines = [forecast(self.startup, self.step, self.options.budget, live, len(found) - live), "would try:"]
        for item in sorted(found, key=lambda item: not item.live):
            lines.append(f"  {item.label}: predicted {item.gain:.2f}x; {item.reason}")
        lines.append("would not try:")
        lines += [f"  {trial.name}: {trial.reason}" for trial in refused]
        return "\n".join(lines)

    def _candidates(self) -> tuple[list[Candidate], list[Trial]]:
        options = self.options
        return candidates(
            self.techniques.values(),
            self.seen,
            only=options.only,
            leave_out=options.leave_out,
            untested=options.untested,
            predicted=self.predicted,
            fit=options.fit is not None,
        )

    # -- the search ----------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Search until done, out of budget or interrupted."""
        found, refused = self._candidates()
        for trial in refused:
            self._add(trial)
        live = [item for item in found if item.live]
        process = sorted((item for item in found if not item.live), key=self._gain_per_second, reverse=True)
        told = forecast(self.startup, self.step, self.options.budget, len(live), len(process))
        self.say(told)
        outcome = Outcome(forecast=told)
        plan: ArmPlan = {}
        try:
            if self.options.fit is not None and self.seen.facts.loss_seen:
                plan = self._make_fit(found, self.options.fit)
            if self._limited is not None:
                live, process = ([item for item in items if self._may_speed_up(item)] for items in (live, process))
            if self._limited is not None and not plan:
                live, process = [], []
            elif self._too_short:
                for candidate in (*live, *process):
                    self._skipped(candidate, self._too_short, plan)
                live, process = [], []
            if self.seen.facts.loss_seen:
                first, later = self._by_promise(live, process)
                plan = self._screen_live(first, plan)
                plan = self._screen_process(process, plan)
                plan = self._screen_live(later, plan)
            confirmation = self._confirmed(plan)
        except KeyboardInterrupt:
            outcome.interrupted = True
            confirmation = None
        outcome.confirmation = confirmation
        self._conclude(outcome, confirmation)
        outcome.trials = tuple(self.trials)
        outcome.seconds = time.monotonic() - self.began
        return outcome

    def _make_fit(self, found: list[Candidate], limit: int) -> ArmPlan:
        """The fastest plan within the limit where the script needs more; empty where it does not, or nothing fits."""
        fit = Fitting(
            self._duel, limit, self.techniques, self.step, say=self.say, add=self._add,
            time_for=lambda seconds, confirms: self._left() - seconds > (self._reserve() if confirms else 0.0),
        ).search(found)  # fmt: skip
        if fit.script_fits or not (fit.stock.held or fit.stock.starved):
            return {}
        self._limited = Limited(
            fit, self._duel, lambda plan, reference, seconds: self._confirm_once(plan, seconds, reference),
            self.numerics, lambda plan: self._riskiest(plan, self.numerics(plan)), say=self.say, add=self._add,
        )  # fmt: skip
        if fit.fits:
            self.step = fit.fits[0].step or self.step
        return self._limited.lean

    def _may_speed_up(self, candidate: Candidate) -> bool:
        """Whether a candidate is worth a trial on top of a plan that fits, and has not been tried for its memory."""
        return not self.techniques[candidate.name].card.saves_memory

    def _confirmed(self, plan: ArmPlan) -> Confirmation | None:
        """What is confirmed of what was screened."""
        if self._limited is not None:
            seconds = min(max(self.options.budget * CONFIRM_SHARE, 20.0), max(self._left() - 2 * self.startup, 15.0))
            self._final, found = self._limited.confirmed(plan, seconds) if plan else ({}, None)
            self._dropped |= self._limited.dropped
            return found
        doubt = {} if plan else self._unresolved()
        return self._confirm(plan or doubt, everything=bool(doubt)) if plan or doubt else None

    def _unresolved(self) -> ArmPlan:
        """The candidate that looked best where no trial could tell: the time that is left goes into its confirmation.

        Fresh processes decide, by a test of their own, so nothing is kept that only looked good.
        """
        best: Trial | None = None
        for trial in self.trials:
            pairing = trial.pairing
            if trial.stage != "screen" or trial.outcome != "no change" or pairing is None:
                continue
            if pairing.ratio >= PROMISING and (best is None or pairing.ratio > _ratio(best)):
                best = trial
        if best is None or self._left() < self._reserve():
            return {}
        self.say(f"{best.name}: not resolved when screened; the time left goes into its confirmation")
        return {name: dict(settings) for name, settings in best.candidate.items()}

    def _known(self, candidate: Candidate, base: ArmPlan) -> Trial | None:
        return self.earlier.get((candidate.label, str(sorted(base))))

    def _gain_per_second(self, candidate: Candidate) -> float:
        """What a process trial promises for what it costs: a compiler comes after an allocator that promises half."""
        cost = self.startup + 6.0 + (PREPARING if candidate.prepares else 0.0)
        if candidate.fills and self.steps_per_epoch:
            cost += self.steps_per_epoch * self.step
        return (candidate.gain - 1.0) / cost

    def _by_promise(self, live: list[Candidate], process: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Live candidates to try before the process ones, and those that can wait.

        Alternating inside one process is cheap while steps are fast. Where they are slow, or the budget small, what
        promises nothing must not use up the time of what does.
        """
        best = max((item.gain for item in process), default=1.0)
        slow = len(live) * max(LEAST_QUADS * 4 * self.step, LIVE_SECONDS) > self.options.budget * LIVE_SHARE
        if best < (1.08 if slow else MUCH):
            return live, []
        return [item for item in live if item.gain >= best], [item for item in live if item.gain < best]

    def _screen_live(self, found: list[Candidate], base: ArmPlan) -> ArmPlan:
        if not found:
            return base
        share = self.options.budget * LIVE_SHARE - self.startup
        each = min(max(share / len(found), LIVE_SECONDS, LEAST_QUADS * 4 * self.step), 15.0 + 30 * self.step)
        screen = LiveScreen(self._duel, self.say, base)
        try:
            for candidate in found:
                cost = each + self.startup / len(found)
                if self._left() - cost < self._reserve():
                    self._skipped(candidate, KEPT, screen.on)
                    continue
                self._try(candidate, screen.on, each, cost, screen.tried)
        finally:
            screen.close()
        return dict(screen.on)

    def _screen_process(self, found: list[Candidate], base: ArmPlan) -> ArmPlan:
        if not found:
            return base
        share = self.options.budget * PROCESS_SHARE
        each = min(max(share / len(found) - self.startup, 6.0, LEAST_QUADS * 4 * self.step), 20.0 + 30 * self.step)
        screen = ProcessScreen(self._duel, base, self.say, self.steps_per_epoch)
        try:
            for candidate in found:
                cost = each + self.startup
                if candidate.fills and self.steps_per_epoch:
                    epoch = self.steps_per_epoch * self.step
                    if epoch > 0.4 * self.options.budget:
                        self._skipped(
                            candidate,
                            f"its steady state begins after one epoch, about {in_words(epoch)}; "
                            f"a larger --budget buys that",
                            screen.base,
                        )
                        continue
                    cost += epoch
                if candidate.prepares:
                    cost += PREPARING
                if self._left() - cost < self._reserve():
                    self._skipped(candidate, KEPT, screen.base)
                    continue
                self._try(candidate, screen.base, each, cost, screen.tried)
        finally:
            screen.close()
        return dict(screen.base)

    def _try(
        self,
        candidate: Candidate,
        base: ArmPlan,
        seconds: float,
        cost: float,
        tried: Callable[[Candidate, float], Trial],
    ) -> None:
        if candidate.name in base:
            return  # a better setting of it is already in
        other = conflicting(candidate.name, base, self.techniques)
        if other:
            needed = self._limited is not None and other in self._limited.lean
            why = "without which the plan does not fit" if needed else "which is faster"
            self._skipped(candidate, f"conflicts with {other}, {why}", base)
            return
        refusal = self._pays(candidate, cost)
        if refusal:
            self._skipped(candidate, refusal, base)
            return
        known = self._known(candidate, base)
        if known is not None:
            self._add(known)
            if known.outcome == "faster" and isinstance(base, dict):
                base[candidate.name] = candidate.settings
            return
        self._add(tried(candidate, seconds))

    # -- confirmation --------------------------------------------------------------------------------------------

    def numerics(self, plan: ArmPlan) -> dict[str, Numerics]:
        """What each technique of a plan does to the numbers of this script."""
        return {
            name: self.techniques[name].numerics(dict(settings), self.seen.facts) for name, settings in plan.items()
        }

    def _confirm(self, plan: ArmPlan, everything: bool = False) -> Confirmation | None:
        """Confirm the plan; where the proof fails, drop the riskiest technique and try once more.

        Args:
            everything: spend all the time that is left on it.
        """
        last: Confirmation | None = None
        for attempt in range(3):
            if not plan:
                return last
            kinds = self.numerics(plan)
            spare = self._left() - 2 * self.startup - 2 * 12 * self.step
            share = spare if everything else self.options.budget * CONFIRM_SHARE
            seconds = min(max(share, 20.0), max(spare, 15.0))
            try:
                last = self._confirm_once(plan, seconds)
            except ArmFailed as failed:
                dropped = failed.techniques or (self._riskiest(plan, kinds),)
                self._add(
                    Trial(name=" + ".join(plan), candidate=dict(plan), reference={}, outcome="failed",
                          reason=failed.reason, stage="confirm", failure=failed.reason)
                )  # fmt: skip
                plan = {name: settings for name, settings in plan.items() if name not in dropped}
                continue
            self._add(
                Trial(name=" + ".join(plan), candidate=dict(plan), reference={},
                      outcome="faster" if last.decision == "faster" and last.proof.passed
                      else "not shown" if not last.proof.passed else "no change",
                      reason=last.proof.reason if not last.proof.passed else "", stage="confirm",
                      pairing=last.pairing, proof=last.proof)
            )  # fmt: skip
            if last.proof.passed and last.decision == "faster":
                self._final = plan
                return last
            if last.proof.passed or attempt == 2 or self._left() < 2 * self.startup + 20:
                return last
            riskiest = self._riskiest(plan, kinds)
            self.say(f"quality not shown with {' + '.join(plan)}; once more without {riskiest}")
            self._dropped[riskiest] = last.proof.reason
            plan = {name: settings for name, settings in plan.items() if name != riskiest}
        return last

    def _confirm_once(self, plan: ArmPlan, seconds: float, reference: ArmPlan | None = None) -> Confirmation:
        """One confirmation of a plan against the untouched script, or what stands for it.

        Raises:
            ArmFailed: an arm crashed or hung.
        """
        kinds, cards = self.numerics({**(reference or {}), **plan}), [self.techniques[name].card for name in plan]
        return confirm(
            self._duel,
            plan,
            seconds,
            numerics=max(kinds.values(), key=RISK.__getitem__),
            precision=max((card.precision for card in cards), key=COARSE.index),
            live={card.name: card.switchable == "live" for card in cards},
            has_dropout=any("Dropout" in layer for model in self.seen.facts.models for layer in model.layers),
            rescaled=self.seen.facts.grad_scaler,
            steps_per_epoch=self.steps_per_epoch,
            fills=any(card.one_off and "data" in card.targets for card in cards),
            targets=frozenset(phase for card in cards for phase in card.targets),
            say=self.say,
            attribute_seconds=min(self.options.budget * ATTRIBUTION_SHARE, max(self._left(), 8.0)),
            reference=reference,
        )

    def _riskiest(self, plan: ArmPlan, kinds: Mapping[str, Numerics]) -> str:
        """The technique most likely to have failed a proof."""
        return max(plan, key=lambda name: suspicion(kinds[name], self.techniques[name].card.precision))

    # -- the outcome ---------------------------------------------------------------------------------------------

    def _conclude(self, outcome: Outcome, confirmation: Confirmation | None) -> None:
        plan = self._final
        lean = self._limited.lean if self._limited is not None else {}
        good = (bool(lean and plan) and confirmation is not None) or (
            confirmation is not None
            and confirmation.proof.passed
            and confirmation.decision == "faster"
            and confirmation.pairing is not None
        )
        if good and confirmation is not None:
            screened = {name: self._screened(name) for name in plan}
            outcome.kept = kept(plan, confirmation, self.numerics(plan), screened, needed=lean)
            outcome.break_even = break_even(confirmation)
        outcome.rejected = rejected(self.trials, {item.name for item in outcome.kept}, self._dropped)
        outcome.verdict = said(outcome, confirmation, self.trials, loss_seen=self.seen.facts.loss_seen)
        if self._limited is not None:
            outcome.fitted = self._limited.fitted({item.name: item.settings for item in outcome.kept}, confirmation)
            pairing, proof = (None, None) if confirmation is None else (confirmation.pairing, confirmation.proof)
            outcome.verdict = verdict(outcome.fitted, bool(outcome.kept), pairing, proof, outcome.interrupted)

    def _screened(self, name: str) -> Pairing | None:
        for trial in self.trials:
            if trial.stage == "screen" and trial.name.partition("(")[0] == name and trial.outcome == "faster":
                return trial.pairing
        return None


def _ratio(trial: Trial) -> float:
    return trial.pairing.ratio if trial.pairing is not None else 1.0
