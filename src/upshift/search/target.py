"""Techniques that change the training: whole runs decide, by time or energy to a target and by the final metric.

A step of another training says nothing about its result, so nothing here is timed by the step. One seed picks: a run
of the untouched script, then one run per candidate on top of those that were sooner, ended as soon as the target is
reached or the best so far is missed. Other seeds decide: whole runs, stock and plan in turn, must be sooner at the
target and as good at the end (`verify.conclude`). What only one seed saw is never kept. Where energy counts, read
"for less energy" for "sooner", and a plan found by step time is no more than a candidate (`spent.Joules`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from upshift.errors import ScriptFailedError, UsageError
from upshift.records import Measurement, Trial
from upshift.records.trial import Outcome
from upshift.records.verification import Verification, WholeRun
from upshift.search.candidates import Candidate, candidates, conflicting
from upshift.search.duel import ArmPlan
from upshift.search.spent import Spent, spent_by
from upshift.search.verify import Options, Verifier, conclude, spec_of, whole_run
from upshift.sites import Technique
from upshift.sites.runner import ChildSpec, Runner
from upshift.units import seconds as in_words

#: What a run with one seed must be sooner at the target (or what it must save) to be taken further.
PROMISING = 1.03
#: A run is ended when it is later at the target than the best so far (or has spent more) by this factor.
PATIENCE = 1.25
KEPT_BACK = "what is left of the budget is kept for the runs that decide"
#: Seeds from which a target that all planned runs reach and no stock run does is no luck.
SEPARATED = 3


@dataclass
class Sought:
    """What came of it. `verification` is None where nothing was worth whole runs over several seeds."""

    plan: ArmPlan
    trials: tuple[Trial, ...] = ()
    verification: Verification | None = None
    verdict: str = ""
    interrupted: bool = False


@dataclass
class Wanted:
    """What the person asked for. `budget` in seconds from now, None: as long as it takes."""

    verify: Options
    only: Sequence[str] = ()
    leave_out: Sequence[str] = ()
    untested: bool = False
    budget: float | None = None
    known: dict[str, Technique] = field(default_factory=dict)


class TargetSearch:
    """Searches on top of a plan whose techniques do not change the training."""

    def __init__(
        self,
        runner: Runner,
        base: ChildSpec,
        seen: Measurement,
        wanted: Wanted,
        blank: Callable[[ArmPlan], Verification],
        say: Callable[[str], None],
        on_trial: Callable[[Trial], None],
    ) -> None:
        """
        Args:
            seen: the diagnosis, for what applies.
            blank: a verification of a plan with what does not come from runs.
        """
        self.runner, self.base, self.seen, self.wanted = runner, base, seen, wanted
        self.blank, self.say, self.on_trial = blank, say, on_trial
        self.spent: Spent = spent_by(wanted.verify)
        self.trials: list[Trial] = []
        self.began = time.monotonic()

    def run(self, start: ArmPlan) -> Sought:
        """Search.

        Args:
            start: the plan found so far, proven by other means; {} where there is none. Where energy counts it is
                kept only if whole runs show that it needs less.

        Raises:
            UsageError: the metric was not found, or the budget does not hold the runs a decision needs.
            ScriptFailedError: the untouched script failed.
            EnvironmentError_: the energy of a run could not be read.
        """
        try:
            stock = self._once({}, "the untouched script", None)
            self._afford(stock.seconds)
            found = self._candidates(stock.steps)
            plan = self._pick(dict(start), found, stock)
            if not plan or (plan == start and not self.spent.judges_start):
                return Sought(plan, tuple(self.trials), verdict=self._nothing(found))
            return self._decide(plan, start)
        except KeyboardInterrupt:
            return Sought(dict(start), tuple(self.trials), verdict="Interrupted before whole runs decided anything.",
                          interrupted=True)  # fmt: skip

    def _candidates(self, steps: int) -> list[Candidate]:
        """What applies, now that a whole run has told how many steps the training makes."""
        wanted, seen = self.wanted, self.seen
        if steps:
            seen = replace(seen, facts=replace(seen.facts, steps_total=steps))
        found, refused = candidates(wanted.known.values(), seen, only=wanted.only, leave_out=wanted.leave_out,
                                    untested=wanted.untested, training=True)  # fmt: skip
        for trial in refused:
            self._add(trial)
        return found

    def _add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.on_trial(trial)

    # -- one seed picks ------------------------------------------------------------------------------------------

    def _pick(self, plan: ArmPlan, found: Sequence[Candidate], stock: WholeRun) -> ArmPlan:
        spent = self.spent
        if not found and not (plan and spent.judges_start):
            return plan
        goal = spent.to_target(stock)
        best = goal if goal is not None else spent.whole(stock)
        if plan:
            before = self._once(plan, " + ".join(plan), best)
            at = spent.to_target(before)
            if spent.judges_start and not self._saves(plan, " + ".join(plan), at, before, best):
                plan = {}
            else:
                best = min(at or best, best)
        for candidate in found:
            tried = {**plan, candidate.name: candidate.settings}
            other = conflicting(candidate.name, plan, self.wanted.known)
            if candidate.name in plan or other:
                if other:
                    self._note(candidate.label, tried, plan, "not tried", f"conflicts with {other}, {spent.which}")
                continue
            if not self._time_for(spent.time(best, stock), stock.seconds):
                self._note(candidate.label, tried, plan, "not tried", KEPT_BACK)
                continue
            try:
                run = self._once(tried, candidate.label, best)
            except ScriptFailedError as failed:
                self._note(candidate.label, tried, plan, "failed", failed.message)
                continue
            at = spent.to_target(run)
            if self._saves(tried, candidate.label, at, run, best, plan):
                assert at is not None
                plan, best = tried, at
        return plan

    def _saves(
        self, tried: ArmPlan, name: str, at: float | None, run: WholeRun, best: float, on: ArmPlan | None = None
    ) -> bool:
        """Whether one run that spent `at` until the target is worth going on with; notes it either way."""
        spent = self.spent
        if at is not None and best / at >= PROMISING:
            self._note(name, tried, on or {}, spent.less, f"{self._goal()} {spent.lead} {spent.words(at)}, before it "
                       f"{spent.words(best)} ({spent.once})")  # fmt: skip
            return True
        told = "not reached" if at is None else f"{spent.lead} {spent.words(at)}"
        less = at is not None and at / best < PROMISING
        self._note(name, tried, on or {}, "no change" if less else spent.more,
                   f"{self._goal()} {told} within {in_words(run.seconds)}, without it {spent.words(best)} "
                   f"({spent.once})")  # fmt: skip
        return False

    def _goal(self) -> str:
        metric = self.wanted.verify.metric
        return f"{metric.name} {metric.target:g}"

    def _note(self, name: str, tried: ArmPlan, on: ArmPlan, outcome: Outcome, reason: str) -> None:
        self._add(
            Trial(name=name, candidate=dict(tried), reference=dict(on), outcome=outcome, reason=reason, stage="screen")
        )

    def _once(self, plan: ArmPlan, name: str, best: float | None) -> WholeRun:
        """One run with the seed that picks, ended early where `best` (seconds or joules to it) is known."""
        options = self.wanted.verify
        metric = options.metric
        assert metric.target is not None
        target = metric.target

        def enough(values: Sequence[tuple[float, float]], spent: float | None) -> bool:
            if best is None:
                return False
            return (spent or 0.0) > PATIENCE * best or any(metric.better(value, target) for _, value in values)

        def tell(at: float, latest: str) -> None:
            self.say(f"{name}: {in_words(at)}, {latest}")

        seed = options.first_seed
        arm: Literal["stock", "plan"] = "plan" if plan else "stock"
        return whole_run(self.runner, spec_of(self.base, plan, seed), arm, seed, options, tell, enough)

    def _time_for(self, run: float, whole: float) -> bool:
        budget = self.wanted.budget
        if budget is None:
            return True
        left = budget - (time.monotonic() - self.began)
        return left - PATIENCE * run >= 2 * self.wanted.verify.seeds * whole

    def _afford(self, whole: float) -> None:
        seeds = self.wanted.verify.seeds
        self.say(f"a whole run takes {in_words(whole)}: the runs that decide take about {in_words(2 * seeds * whole)}")
        if self.wanted.budget is not None and not self._time_for(0.0, whole):
            raise UsageError(
                f"a whole run takes {in_words(whole)}: {seeds} seeds of both arms do not fit into the --budget.",
                remedy=f"Allow at least {in_words(whole * (2 * seeds + 2) * 1.1)}, or leave --budget out.",
            )

    # -- other seeds decide --------------------------------------------------------------------------------------

    def _decide(self, plan: ArmPlan, start: ArmPlan) -> Sought:
        asked = self.wanted.verify
        options = dataclasses.replace(asked, first_seed=asked.first_seed + 1)
        names = " + ".join(plan)
        self.say(f"{names}: whole runs over {options.seeds} other seeds decide")
        runs = Verifier(self.runner, self.base, plan, options, self.say, lambda runs: None).run()
        found = conclude(runs, options, self.blank(plan))
        problem = _problem(found, self.spent)
        if problem:
            found = replace(found, answer=found.answer if found.answer != "as good" else "not shown", reason=problem)
            stays = {} if self.spent.judges_start else dict(start)
            kept = f"; {' + '.join(stays)} stays" if stays else ""
            return Sought(stays, tuple(self.trials), found, f"{names}: {problem}{kept}.")
        sooner = self.spent.ratio(found)
        gain = (
            self.spent.gain(f"{sooner.mean:.2f}x", f"{sooner.low:.2f}x")
            if sooner is not None and sooner.mean is not None and sooner.low is not None
            else f"the target in {found.reached[1]} runs, the untouched script in {found.reached[0]}"
        )
        changes = [name for name in plan if name not in start]
        another = f" This is another training ({', '.join(changes)})." if changes else ""
        return Sought(
            plan, tuple(self.trials), found,
            f"{names}: {gain} over {found.seeds} seeds, and {found.metric} as good at the end: "
            f"{found.reason}.{another}",
        )  # fmt: skip

    def _nothing(self, found: Sequence[Candidate]) -> str:
        if not found:
            return "No technique that changes the training applies."
        return f"No technique that changes the training {self.spent.nothing} {self._goal()}."


def _problem(found: Verification, spent: Spent) -> str:
    """Why the runs do not show that the plan spends less to the target and is as good at the end, or nothing."""
    stock, planned = found.reached
    sooner = spent.ratio(found)
    if found.answer != "as good":
        return f"not shown to be as good on {found.metric}: {found.reason}"
    if sooner is None:
        if stock == planned == found.seeds:
            return "what the runs spent is not known"
        # All of the one and none of the other: for three pairs Fisher's exact test gives 5 %, for fewer more.
        if stock == 0 and planned == found.seeds >= SEPARATED:
            return ""
        return f"the target was reached in {stock} stock and {planned} planned runs of {found.seeds}"
    if sooner.low is None or sooner.low <= 1.0:
        return f"not {spent.better} beyond the spread of {found.seeds} seeds"
    return ""
