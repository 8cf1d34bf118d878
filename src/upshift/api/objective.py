"""What `tune` is to make smaller: the time of a step; the time, the cost or the energy to a target."""

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
from upshift.hardware.watts import parse, stated
from upshift.hook.process import HookRunner
from upshift.records import Measurement, Plan, Trial, TuneReport
from upshift.records.plan import Kept, Rejected
from upshift.records.trial import Proof
from upshift.records.verification import Energy, Verification
from upshift.techniques import registry

if TYPE_CHECKING:
    from upshift.measure.power import Meter
    from upshift.search.duel import ArmPlan
    from upshift.search.target import Sought
    from upshift.search.verify import Options

Kind = Literal["step", "time-to-target", "cost", "energy"]


@dataclass(frozen=True)
class Objective:
    """`metric` as in `upshift verify`; `target` and `margin` in its unit; `price` per hour of this machine.

    `watts`: `MIN:MAX` of one logical core, for an estimate of energy; empty: what `hardware/watts.toml` states.
    """

    kind: Kind = "step"
    metric: str = ""
    regex: str | None = None
    target: float | None = None
    margin: float | None = None
    seeds: int = 3
    price: float | None = None
    watts: str = ""

    @property
    def by_metric(self) -> bool:
        """Whether whole runs decide, so that techniques that change the training may take part."""
        return self.kind != "step" and bool(self.metric)

    def check(self) -> None:
        """Raises UsageError where something is missing, would be ignored, or cannot be understood."""
        if self.kind in ("time-to-target", "energy") and (not self.metric or self.target is None):
            raise UsageError(
                f"--objective {self.kind} needs --metric and --target.",
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
                "--metric and --target go with --objective time-to-target, cost or energy.",
                remedy="To prove a plan on a metric: upshift verify --metric NAME.",
            )
        if self.watts and self.kind != "energy":
            raise UsageError("--watts goes with --objective energy.", remedy="Name that objective, or leave it out.")
        if self.watts:
            parse(self.watts)
        if self.by_metric:
            self.options()

    def meter(self, device: str, say: Say) -> Meter | None:
        """What reads the energy of runs on `device`, told to the person; None where energy does not count.

        Raises:
            MissingExtraError, EnvironmentError_: it can be neither measured nor estimated.
        """
        if self.kind != "energy":
            return None
        from upshift.measure.power import meter

        found = meter(device, parse(self.watts) if self.watts else stated())
        say(found.how)
        if self.watts and found.basis == "measured":
            say("--watts is not used: the processor's energy is measured")
        return found

    def options(self, meter: Meter | None = None) -> Options:
        """What the whole runs are judged by."""
        from upshift.measure.metrics import Metric
        from upshift.search.verify import Options

        return Options(
            Metric.parse(self.metric, self.target, self.regex), self.seeds, self.margin, price=self.price, meter=meter
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
    say: Say, on_trial: Callable[[Trial], None], meter: Meter | None = None,
) -> Sought:  # fmt: skip
    """Whole runs with techniques that change the training, on top of the plan found so far.

    Raises:
        UsageError, ScriptFailedError, EnvironmentError_: see `search.target`.
    """
    from upshift.search.target import TargetSearch, Wanted

    options = objective.options(meter)
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
    target: Target, report: TuneReport, plan: Plan, sought: Sought, objective: Objective, meter: Meter | None = None
) -> tuple[TuneReport, Plan]:
    """Report and plan with what whole runs said.

    Time and cost: the plan is theirs only where it changes the training, else that of the step times stays. Energy:
    the plan is always theirs, and empty where they showed nothing, since a faster step may need more of it.
    """
    by_energy = objective.kind == "energy" and not sought.interrupted
    verdict = sought.verdict if by_energy else " ".join(text for text in (sought.verdict, report.verdict) if text)
    report = replace(
        report, trials=(*report.trials, *sought.trials), verification=sought.verification, verdict=verdict,
        interrupted=report.interrupted or sought.interrupted,
    )  # fmt: skip
    names = {item.name for item in plan.kept}
    stays = tuple(item for item in plan.kept if item.name in sought.plan)
    added = tuple(
        Kept(name=name, settings=dict(settings), numerics="changes_training", note="decided by whole runs")
        for name, settings in sought.plan.items()
        if name not in names
    )
    refused = tuple(
        Rejected(name=trial.name, reason=trial.reason)
        for trial in sought.trials
        if not _techniques(trial) <= sought.plan.keys() and not _techniques(trial) <= names
    )
    plan = replace(plan, verdict=verdict, rejected=(*plan.rejected, *refused))
    found = sought.verification
    if by_energy and meter is not None:
        seen = found.energy if found is not None else None
        seen = seen or Energy(None, None, None, 0, basis=meter.basis, how=meter.how)
        report = replace(report, objective="energy", energy=seen)
        plan = replace(plan, objective="energy", rejected=(*plan.rejected, *_dropped(plan, stays, seen)))
    if not by_energy and (not added or found is None):
        return report, plan
    kept = (*stays, *added)
    proof = _proof(plan, found, changes_training=bool(added)) if kept and found is not None else None
    report = replace(
        report, kept=tuple(item.name for item in kept), proof=proof, objective=objective.kind, verdict=sought.verdict
    )
    if kept != plan.kept:
        # The figures of the plan by step time belong to another set of techniques.
        plan = replace(plan, speedup=None, low=None, high=None, pairs=0, break_even_steps=None, pace=None)
    techniques = {item.name: dict(item.settings) for item in kept}
    plan = replace(
        plan, kept=kept, proof=proof, objective=objective.kind, verdict=sought.verdict,
        to_target=found.target_speedup if kept and found is not None else None,
        one_off_seconds=plan.one_off_seconds if kept else 0.0,
        energy=found.energy if kept and found is not None else None,
        fingerprint=target.mark(techniques, plan.device, plan.fingerprint.files),
    )  # fmt: skip
    return report, plan


def _techniques(trial: Trial) -> set[str]:
    """Names in `fused + larger_batch(factor=2)`."""
    return {part.partition("(")[0] for part in trial.name.split(" + ")}


def _dropped(plan: Plan, stays: tuple[Kept, ...], seen: Energy) -> tuple[Rejected, ...]:
    why = f"kept by the time of a step, but not shown to need less energy ({seen.basis}) to the target"
    return tuple(
        Rejected(name=item.name, reason=why, settings=item.settings) for item in plan.kept if item not in stays
    )


def _proof(plan: Plan, found: Verification, *, changes_training: bool) -> Proof:
    """The rung `metric`. What was shown about a plan that changes no training stays: the guard needs its band."""
    reason = f"{found.metric}: {found.answer} over {found.seeds} seeds; {found.reason}"
    if not changes_training and plan.proof is not None:
        return replace(plan.proof, rung="metric", passed=True, reason=reason)
    return Proof(
        rung="metric", passed=True, reason=reason,
        no_band="the plan changes the training, so the untouched loss is no measure for it",
    )  # fmt: skip
