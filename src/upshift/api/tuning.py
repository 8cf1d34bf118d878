"""tune(): a plan searched and written with its evidence."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from upshift.api.diagnosis import Diagnosed, DiagnoseOptions, child, diagnose
from upshift.api.objective import Objective, Search, cost_of, joined, seek
from upshift.api.target import Say, Target
from upshift.errors import DoesNotFitError, RecordError, ScriptFailedError
from upshift.hardware.device import device_name
from upshift.hook.process import HookRunner
from upshift.records import Finding, Measurement, Plan, Trial, TuneReport, codec, planfile
from upshift.records.fingerprint import own_version
from upshift.records.plan import Pace, Setting
from upshift.records.planfile import slug
from upshift.sites import Numerics
from upshift.techniques import registry

if TYPE_CHECKING:
    from upshift.search.concluding import Outcome
    from upshift.search.confirm import Confirmation

#: Part of a budget that goes into the search by step time where whole runs decide in the end.
STEP_SHARE = 0.4


@dataclass
class TuneOptions:
    """What `tune` is asked for. `budget` in seconds, the diagnosis included; None: three minutes, or less where the
    planned training is too short to pay that back. Where whole runs decide (`objective`), they take what they need.
    """

    budget: float | None = None
    only: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    untested: bool = False
    steps_planned: int | None = None
    plan_file: Path | None = None
    resume: bool = False
    dry_run: bool = False
    fit: int | None = None
    """Bytes the plan may hold: on the accelerator where the training uses one, else in host memory."""
    objective: Objective = field(default_factory=Objective)
    diagnose: DiagnoseOptions = field(default_factory=DiagnoseOptions)


@dataclass(frozen=True)
class Tuned:
    """What a search wrote."""

    report: TuneReport
    plan: Plan | None
    plan_file: Path
    report_file: Path
    page: Path | None = None


class _State:
    """The trials of a search under way, so that `tune --resume` need not repeat them."""

    def __init__(self, target: Target) -> None:
        self.file = Path(".upshift") / "tune" / f"{slug(str(target.stem))}.json"

    def load(self, target: Target) -> TuneReport | None:
        if not self.file.exists():
            return None
        try:
            report = codec.read(self.file, TuneReport)
        except RecordError:
            return None
        return report if report.arguments == target.arguments and report.script == target.name else None

    def save(self, report: TuneReport) -> None:
        try:
            codec.write(self.file, report)
        except OSError:
            pass  # a search goes on without its notebook


def tune(target: Target, options: TuneOptions | None = None, say: Say = lambda text: None,
         on_diagnosed: Callable[[Diagnosed], None] = lambda found: None,
         on_limit: Say = lambda text: None) -> Tuned:  # fmt: skip
    """Search a plan for this script on this machine, and write it with its evidence.

    Args:
        on_diagnosed: told what the diagnosis found.
        on_limit: told why the search is given less than the default budget, and what energy is read from.

    Raises:
        UpshiftError: see `diagnose`; also when the plan file cannot be written.
    """
    from upshift.search.autopilot import Autopilot
    from upshift.search.autopilot import Options as SearchOptions
    from upshift.search.candidates import DEFAULT_BUDGET

    options = options or TuneOptions()
    goal = options.objective
    goal.check()
    # Whole runs need the larger part of a budget.
    budget = options.budget * (STEP_SHARE if goal.by_metric else 1.0) if options.budget else DEFAULT_BUDGET
    target = target.check().script
    for name in (*options.only, *options.leave_out):
        registry.get(name)
    plan_file = options.plan_file or target.plan_file
    if not options.dry_run:
        _check_writable(plan_file)
    began = time.monotonic()
    state = _State(target)
    earlier = state.load(target) if options.resume else None
    if earlier is not None:
        say(f"resuming: {len(earlier.trials)} trials are known")
        found = Diagnosed(earlier.measurement, earlier.findings, earlier.verdict, ())
        files = _files_of(earlier)
    else:
        watch = options.diagnose
        watch.seconds = min(watch.seconds, max(budget * 0.12, 5.0))
        found = _watched(target, options, watch, say)
        files = found.files
    on_diagnosed(found)
    measurement = found.measurement
    if any(note.startswith("the script failed") for note in measurement.notes):
        raise ScriptFailedError(measurement.notes[-1] + ".", remedy="It must run under plain python first.")

    meter = goal.meter(measurement.facts.device, on_limit)

    def report_of(trials: Sequence[Trial], verdict: str, **more: Any) -> TuneReport:
        return TuneReport(
            script=target.name,
            arguments=target.arguments,
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
            measurement=measurement,
            findings=found.findings,
            trials=tuple(trials),
            verdict=verdict,
            plan_file=str(plan_file),
            kept=more.pop("kept", ()),
            seconds=time.monotonic() - began,
            budget=budget,
            isolation=measurement.isolation,
            **more,
        )

    seen: list[Trial] = list(earlier.trials) if earlier is not None else []

    def on_trial(trial: Trial) -> None:
        seen.append(trial)
        state.save(report_of(seen, "the search was interrupted"))
        say(f"{trial.name}: {trial.reason or trial.outcome}")

    pilot = Autopilot(
        HookRunner(),
        child(target, options.diagnose, "arm"),
        measurement,
        {
            technique.card.name: technique
            for technique in registry.all_techniques()
            if not (goal.by_metric and technique.card.numerics == Numerics.CHANGES_TRAINING)
        },
        SearchOptions(
            budget=max(budget - (time.monotonic() - began), 20.0),
            only=options.only,
            leave_out=options.leave_out,
            untested=options.untested,
            steps_planned=options.steps_planned,
            seed=options.diagnose.seed,
            fit=options.fit,
        ),
        say,
        on_trial,
        earlier=tuple(earlier.trials) if earlier is not None else (),
        predicted=_predicted(found.findings),
    )
    if options.budget is None:
        limited = pilot.limit(spent := time.monotonic() - began)
        budget = pilot.options.budget + spent
        if limited:
            on_limit(limited)
    if options.dry_run:
        told = pilot.plan_ahead()
        return Tuned(report_of((), told, forecast=told), None, plan_file, plan_file)
    outcome = pilot.run()
    final = outcome.confirmation
    report = report_of(
        outcome.trials,
        outcome.verdict,
        kept=tuple(item.name for item in outcome.kept),
        forecast=outcome.forecast,
        interrupted=outcome.interrupted,
        final=final.pairing if final is not None and not _against(outcome) else None,
        proof=final.proof if final is not None else None,
        fitted=outcome.fitted,
    )
    plan = _plan(target, report, outcome, files)
    if goal.by_metric and not outcome.interrupted:
        # What is proven by now must not be lost when a whole run fails.
        _write(target, report, plan, plan_file, say)
        left = options.budget - (time.monotonic() - began) if options.budget else None
        search = Search(options.only, options.leave_out, options.untested, left, options.diagnose.allow_remote_writes)
        sought = seek(target, goal, plan.techniques, measurement, files, search, say, on_trial, meter)
        report, plan = joined(target, report, plan, sought, goal, meter)
        taken = time.monotonic() - began
        report = replace(report, seconds=taken, budget=options.budget or taken)
        plan = replace(plan, search_seconds=taken)
    if goal.price is not None:
        gain = plan.speedup if plan.kept else None
        report = replace(report, cost=cost_of(measurement, gain, goal.price, time.monotonic() - began))
    report_file, page = _write(target, report, plan, plan_file, say)
    if not report.interrupted:
        state.file.unlink(missing_ok=True)
    return Tuned(report, plan, plan_file, report_file, page)


def _write(target: Target, report: TuneReport, plan: Plan, plan_file: Path, say: Say) -> tuple[Path, Path]:
    """Write plan, report and page; returns where the last two lie."""
    from upshift.report import html

    if not plan.kept and plan_file.exists() and (report.interrupted or report.fitted is not None):
        say(f"{plan_file} is left as it was")
    else:
        planfile.write(plan_file, plan)
    report_file = Path(".upshift") / "reports" / f"{slug(str(target.stem))}.json"
    codec.write(report_file, report)
    page = report_file.with_suffix(".html")
    codec.write_bytes(page, html.render_tune(report, plan=plan).encode())
    return report_file, page


def _watched(target: Target, options: TuneOptions, watch: DiagnoseOptions, say: Say) -> Diagnosed:
    """The diagnosis. Where memory is limited and the script itself runs out of it, that of the script with the first
    techniques that save enough.

    Raises:
        UpshiftError: see `diagnose`. DoesNotFitError: it runs out of memory with each of them, too.
    """
    from upshift.search.fitting import out_of_memory

    try:
        found = diagnose(target, watch, say)
        failed = _failure(found)
        if options.fit is None or not out_of_memory(failed):
            return found
    except ScriptFailedError as error:
        if options.fit is None or not out_of_memory(str(error)):
            raise
    for plan in _sparing(options):
        names = " + ".join(plan)
        say(f"the script runs out of memory; watching it with {names}")
        try:
            found = diagnose(target, dataclasses.replace(watch, plan=plan), say)
        except ScriptFailedError:
            continue
        if not _failure(found):
            note = f"watched with {names}, since the untouched script runs out of memory here"
            measurement = replace(found.measurement, notes=(*found.measurement.notes, note))
            return dataclasses.replace(found, measurement=measurement)
    raise DoesNotFitError(
        "the script runs out of memory here, and so it does with every technique that saves memory.",
        remedy="Use smaller batches, a smaller model or a larger device.",
    )


def _failure(found: Diagnosed) -> str:
    return next((note for note in found.measurement.notes if note.startswith("the script failed")), "")


def _sparing(options: TuneOptions) -> list[dict[str, dict[str, Setting]]]:
    """What may let a script run that needs too much memory: each technique that saves some, then all together."""
    cards = [
        technique.card
        for technique in registry.all_techniques()
        if technique.card.saves_memory
        and technique.card.numerics != Numerics.CHANGES_TRAINING
        and technique.card.name not in options.leave_out
        and (not options.only or technique.card.name in options.only)
    ]
    alone: list[dict[str, dict[str, Setting]]] = [{card.name: {}} for card in cards]
    together: dict[str, dict[str, Setting]] = {}
    for card in cards:
        if not any(name in card.conflicts or card.name in registry.get(name).card.conflicts for name in together):
            together[card.name] = {}
    return [*alone, together] if len(together) > 1 else alone


def _against(outcome: Outcome) -> str:
    """What stood for the untouched script in the confirmation; empty where that ran itself."""
    return outcome.fitted.against if outcome.fitted is not None else ""


def _predicted(findings: Sequence[Finding]) -> dict[str, float]:
    """Technique -> the largest speed-up a finding predicts for it."""
    gains: dict[str, float] = {}
    for finding in findings:
        for name in finding.techniques:
            gains[name] = max(gains.get(name, 1.0), finding.gain.or_else(1.0))
    return gains


def _files_of(report: TuneReport) -> tuple[str, ...]:
    return (Path(report.script).name,)


def _check_writable(file: Path) -> None:
    """Find out before the search, not after it, that its result cannot be written."""
    from upshift.errors import EnvironmentError_

    folder = file.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise EnvironmentError_(
            f"the plan {file} cannot be written.", remedy="Name another place with --plan FILE, or make it writable."
        )
    try:
        Path(".upshift").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=".upshift"):
            pass
    except OSError as error:
        raise EnvironmentError_(
            f"records cannot be written to {Path('.upshift').resolve()}: {error.strerror}.",
            remedy="Start upshift in a folder that can be written.",
        ) from None
    if file.exists():
        planfile.read(file)


def _plan(target: Target, report: TuneReport, outcome: Any, files: tuple[str, ...]) -> Plan:
    # The speed-up over another plan is none over the script.
    final, proof = report.final, report.proof
    kept = outcome.kept
    device = device_name(report.measurement.facts.device)
    techniques = {item.name: dict(item.settings) for item in kept}
    return Plan(
        script=target.name,
        arguments=target.arguments,
        created=report.created,
        device=device,
        verdict=report.verdict,
        fingerprint=target.mark(techniques, device, files),
        speedup=final.ratio if final is not None and kept else None,
        low=final.low if final is not None and kept else None,
        high=final.high if final is not None and kept else None,
        pairs=final.quads if final is not None and kept else 0,
        break_even_steps=outcome.break_even,
        one_off_seconds=outcome.confirmation.one_off if outcome.confirmation is not None and kept else 0.0,
        search_seconds=report.seconds,
        step_seconds=report.measurement.anatomy.step.value,
        proof=proof if kept else None,
        kept=kept,
        rejected=outcome.rejected,
        pace=_pace(outcome.confirmation, report.measurement) if kept else None,
        upshift=own_version(),
    )


def _pace(confirmation: Confirmation | None, seen: Measurement) -> Pace | None:
    """The pace of the plan, with the samples of a step where the diagnosis saw them."""
    pace = confirmation.pace if confirmation is not None else None
    samples = seen.anatomy.samples.value
    if pace is None or samples is None:
        return pace
    return replace(pace, samples_per_second=samples / pace.seconds)
