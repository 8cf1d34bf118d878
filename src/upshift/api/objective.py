"""What `tune` is to make smaller: the time of a step, the time or the cost to a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from msgspec.structs import replace

from upshift.api.diagnosis import DiagnoseOptions, child
from upshift.api.target import Say, Target
from upshift.api.verifying import blank
from upshift.errors import UsageError
from upshift.hardware.device import device_name
from upshift.hook.process import HookRunner
from upshift.records import Measurement, Plan, Trial, TuneReport
from upshift.records.plan import Kept, Rejected
from upshift.records.trial import Proof
from upshift.records.verification import Verification
from upshift.techniques import registry

if TYPE_CHECKING:
    from upshift.search.duel import ArmPlan
    from upshift.search.target import Sought
    from upshift.search.verify import Options

Kind = Literal["step", "time-to-target", "cost"]


@dataclass(frozen=True)
class Objective:
    """`metric` as in `upshift verify`; `target` and `margin` in its unit; `price` per hour of this machine."""

    kind: Kind = "step"
    metric: str = ""
    regex: str | None = None
    target: float | None = None
    margin: float | None = None
    seeds: int = 3
    price: float | None = None

    @property
    def by_metric(self) -> bool:
        """Whether whole runs decide, so that techniques that change the training may take part."""
        return self.kind != "step" and bool(self.metric)

    def check(self) -> None:
        """Raises UsageError where something is missing, would be ignored, or cannot be understood."""
        if self.kind == "time-to-target" and (not self.metric or self.target is None):
            raise UsageError(
                "--objective time-to-target needs --metric and --target.",
                remedy="Say what counts and how far: --metric accuracy:max --target 0.97.",
            )
        if self.kind == "cost" and self.price is None:
            raise UsageError(
                "--objective cost needs a price.", remedy="Name this machine's price an hour: --price 2.1."
            )
        if self.kind == "cost" and bool(self.metric) != (self.target is not None):
            raise UsageError(
                "the cost to a target needs both --metric and --target.",
                remedy="Name both, or neither for the cost of a step.",
            )
        if self.kind == "step" and (self.metric or self.target is not None):
            raise UsageError(
                "--metric and --target go with --objective time-to-target or cost.",
                remedy="To prove a plan on a metric: upshift verify --metric NAME.",
            )
        if self.by_metric:
            self.options()

    def options(self) -> Options:
        """What the whole runs are judged by."""
        from upshift.measure.metrics import Metric
        from upshift.search.verify import Options

        return Options(
            Metric.parse(self.metric, self.target, self.regex), self.seeds, self.margin, price=self.price
        )  # fmt: skip


@dataclass(frozen=True)
class Search:
    """Which techniques may be tried, and for how many seconds (None: as long as it takes)."""

    only: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    untested: bool = False
    budget: float | None = None
    allow_remote_writes: bool = False


def cost_of(seen: Measurement, speedup: float | None, price: float, searched: float) -> str:
    """What 1,000 steps cost without and with the plan, and the search: estimated from times and the price per hour."""
    step = seen.anatomy.step.value
    if step is None:
        return "the cost of a step is unknown: no step was timed"
    stock = step * 1000 * price / 3600
    spent = searched * price / 3600
    text = f"1,000 steps cost {stock:.4g} (estimated: time x {price:g} an hour)"
    if speedup is None:
        return f"{text}; the search cost {spent:.4g}"
    saved = stock * (1.0 - 1.0 / speedup)
    back = spent / saved * 1000 if saved > 0 else None
    paid = f", earned back after {back:,.0f} steps" if back is not None else ""
    return f"{text}, {stock / speedup:.4g} with the plan; the search cost {spent:.4g}{paid}"


def seek(
    target: Target, objective: Objective, start: ArmPlan, seen: Measurement, files: tuple[str, ...], search: Search,
    say: Say, on_trial: Callable[[Trial], None],
) -> Sought:  # fmt: skip
    """Whole runs with techniques that change the training, on top of the plan found so far.

    Raises:
        UsageError, ScriptFailedError: see `search.target`.
    """
    from upshift.search.target import TargetSearch, Wanted

    options = objective.options()
    device = device_name(seen.facts.device)
    spec = child(
        target, DiagnoseOptions(allow_remote_writes=search.allow_remote_writes, extra={"collect": True}), "run"
    )
    wanted = Wanted(
        options, search.only, search.leave_out, search.untested, search.budget,
        {technique.card.name: technique for technique in registry.all_techniques()},
    )  # fmt: skip
    runner = HookRunner(extra={"PYTHONUNBUFFERED": "1"})

    def empty(plan: ArmPlan) -> Verification:
        return blank(target, options, plan, target.mark(plan, device, files))

    return TargetSearch(runner, spec, seen, wanted, empty, say, on_trial).run(start)


def joined(
    target: Target, report: TuneReport, plan: Plan, sought: Sought, objective: Objective
) -> tuple[TuneReport, Plan]:
    """Report and plan with what whole runs said; the plan is theirs only where it changes the training."""
    verdict = " ".join(text for text in (sought.verdict, report.verdict) if text)
    report = replace(
        report, trials=(*report.trials, *sought.trials), verification=sought.verification, verdict=verdict,
        interrupted=report.interrupted or sought.interrupted,
    )  # fmt: skip
    names = {item.name for item in plan.kept}
    added = tuple(
        Kept(name=name, settings=dict(settings), numerics="changes_training", note="decided by whole runs")
        for name, settings in sought.plan.items()
        if name not in names
    )
    refused = tuple(
        Rejected(name=trial.name, reason=trial.reason)
        for trial in sought.trials
        if trial.name.partition("(")[0] not in sought.plan
    )
    plan = replace(plan, verdict=verdict, rejected=(*plan.rejected, *refused))
    found = sought.verification
    if not added or found is None:
        return report, plan
    proof = Proof(
        rung="metric", passed=True, reason=f"{found.metric}: {found.answer} over {found.seeds} seeds; {found.reason}",
        no_band="the plan changes the training, so the untouched loss is no measure for it",
    )  # fmt: skip
    kept = (*plan.kept, *added)
    verdict = sought.verdict
    report = replace(
        report, kept=tuple(item.name for item in kept), proof=proof, objective=objective.kind, verdict=verdict
    )
    techniques = {item.name: dict(item.settings) for item in kept}
    plan = replace(
        plan, kept=kept, proof=proof, objective=objective.kind, to_target=found.target_speedup, verdict=verdict,
        speedup=None, low=None, high=None, pairs=0, break_even_steps=None,
        fingerprint=target.mark(techniques, plan.device, plan.fingerprint.files),
    )  # fmt: skip
    return report, plan
