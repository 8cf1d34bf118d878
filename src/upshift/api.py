"""diagnose(), tune(), run(), load(): wiring only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from upshift.errors import PlanError, RecordError, ScriptFailedError, UsageError
from upshift.hardware import machine
from upshift.hardware.device import device_name, kinds_here
from upshift.hook import choosing
from upshift.hook.choosing import Chosen
from upshift.hook.process import HookRunner, command, environment
from upshift.records import Finding, Measurement, Plan, Run, Trial, TuneReport, codec, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.planfile import slug
from upshift.records.runlog import LOG, RunLog, fold, new_id
from upshift.records.verification import Verification, WholeRun
from upshift.sites.runner import ChildSpec
from upshift.techniques import registry

if TYPE_CHECKING:
    from upshift.hardware.health import Health
    from upshift.hook.diagnosing import Diagnosis
    from upshift.search.selftest import SelftestReport

# The start of `run` is the user's time: what only the other commands need is imported where they need it.

Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What to run: a script, or with `module` a module as `python -m` takes it, and its arguments."""

    name: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    @property
    def starts_others(self) -> bool:
        """Whether this is no Python script but a command: `torchrun`, `sh`, an executable that is no script."""
        path = Path(self.name)
        if self.module or path.suffix == ".py":
            return False
        if path.is_file():
            return os.access(path, os.X_OK) and not _is_python_script(path)
        return os.sep not in self.name and shutil.which(self.name) is not None

    def check(self) -> Target:
        """Raises UsageError where there is no such script, or it is a command that starts others."""
        if self.starts_others:
            script = next((item for item in self.arguments if item.endswith(".py")), "train.py")
            raise UsageError(
                f"{self.name} starts other programs; only upshift run follows those.",
                remedy=f"Name the training script itself: {script}, as one process.",
            )
        if not self.module:
            path = Path(self.name)
            if not path.exists():
                raise UsageError(f"there is no script {self.name}.", remedy="Check the path; options go before it.")
            if path.is_dir():
                raise UsageError(f"{self.name} is a folder.", remedy="Name the training script inside it.")
        return self

    @property
    def stem(self) -> Path:
        """Where files named after the target lie: beside the script, or in the current folder for a module."""
        return choosing.stem(self.name, self.module)

    @property
    def plan_file(self) -> Path:
        """`train.upshift.toml` beside `train.py`."""
        return choosing.plan_beside(self.name, self.module)


def _is_python_script(path: Path) -> bool:
    """Whether an executable file is a person's Python script; launchers are written in Python, too."""
    from upshift.hook.launched import LAUNCHERS

    with path.open("rb") as file:
        first = file.readline(256)
    return first.startswith(b"#!") and b"python" in first and path.name not in LAUNCHERS


@dataclass
class DiagnoseOptions:
    """How long to watch and what to write."""

    seconds: float = 20.0
    trace: str = ""
    isolate: bool = True
    allow_remote_writes: bool = False
    patience: float = 600.0
    probe: bool = True
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosed:
    """A diagnosis: what was measured, what follows from it."""

    measurement: Measurement
    findings: tuple[Finding, ...]
    verdict: str
    files: tuple[str, ...] = ()


def _peaks(device: str, say: Say) -> Any:
    """The machine's measured peaks, from the cache or from a process of its own; None where it could not be probed."""
    from upshift.hardware.probe import Peaks

    with tempfile.TemporaryDirectory(prefix="upshift-") as folder:
        file = Path(folder) / "peaks.json"
        say("measuring this machine's peaks (once)")
        subprocess.run(
            [sys.executable, "-m", "upshift.hardware.probe", "--device", device, "--json", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        return codec.read(file, Peaks) if file.exists() else None


def _with_floor(diagnosis: Diagnosis, say: Say) -> Measurement:
    from upshift.measure.flops import StepCount, floor

    measurement = diagnosis.measurement
    if diagnosis.count is None:
        return measurement
    try:
        peaks = _peaks(measurement.facts.device, say)
    except (subprocess.TimeoutExpired, RecordError, OSError):
        peaks = None
    if peaks is None:
        return measurement
    count = msgspec.convert(diagnosis.count, StepCount)
    return msgspec.structs.replace(measurement, floor=floor(count, measurement.anatomy.step, peaks))


def _child(target: Target, options: DiagnoseOptions, mode: Any) -> ChildSpec:
    return ChildSpec(
        mode=mode,
        target=target.name,
        arguments=target.arguments,
        module=target.module,
        seed=options.seed,
        isolate=options.isolate,
        options={"allow_remote_writes": options.allow_remote_writes, **options.extra},
    )


def diagnose(target: Target, options: DiagnoseOptions | None = None, say: Say = lambda text: None) -> Diagnosed:
    """Run the script as it is, isolated, until enough is seen; nothing of the user's is touched.

    Raises:
        UsageError: no such script.
        NoTrainingError: no training step was seen.
        ScriptFailedError: it crashed first.
    """
    from upshift.diagnose.registry import diagnose as find
    from upshift.diagnose.verdict import verdict as say_verdict
    from upshift.hook.diagnosing import observe

    options = options or DiagnoseOptions()
    target.check()
    spec = _child(target, options, "diagnose")
    spec = msgspec.structs.replace(
        spec, options={**spec.options, "seconds": options.seconds, "trace": "trace" if options.trace else ""}
    )

    def progress(steps: int, seconds: float) -> None:
        say(f"watching: {steps} steps, {seconds:.0f} of at most {options.seconds:.0f} s")

    say("starting the script")
    found = observe(
        HookRunner(),
        spec,
        on_progress=progress,
        patience=options.patience,
        trace_to=Path(options.trace) if options.trace else None,
    )
    measurement = _with_floor(found, say) if options.probe else found.measurement
    measurement = msgspec.structs.replace(measurement, machine=machine.describe())
    if found.code not in (None, 0):
        note = f"the script failed after {measurement.anatomy.steps_seen} steps: {found.how}"
        measurement = msgspec.structs.replace(measurement, notes=(*measurement.notes, note))
    findings = find(measurement)
    return Diagnosed(measurement, findings, say_verdict(measurement, findings), found.files)


@dataclass
class TuneOptions:
    """What `tune` is asked for. `budget` in seconds, the diagnosis included; None: three minutes, or less where the
    planned training is too short to pay that back."""

    budget: float | None = None
    only: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    untested: bool = False
    steps_planned: int | None = None
    plan_file: Path | None = None
    resume: bool = False
    dry_run: bool = False
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
        on_limit: told why the search is given less than the default budget.

    Raises:
        UpshiftError: see `diagnose`; also when the plan file cannot be written.
    """
    from upshift.search.autopilot import Autopilot
    from upshift.search.autopilot import Options as SearchOptions
    from upshift.search.candidates import DEFAULT_BUDGET

    options = options or TuneOptions()
    budget = options.budget or DEFAULT_BUDGET
    target.check()
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
        found = diagnose(target, watch, say)
        files = found.files
    on_diagnosed(found)
    measurement = found.measurement
    if any(note.startswith("the script failed") for note in measurement.notes):
        raise ScriptFailedError(measurement.notes[-1] + ".", remedy="It must run under plain python first.")

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
        _child(target, options.diagnose, "arm"),
        measurement,
        {technique.card.name: technique for technique in registry.all_techniques()},
        SearchOptions(
            budget=max(budget - (time.monotonic() - began), 20.0),
            only=options.only,
            leave_out=options.leave_out,
            untested=options.untested,
            steps_planned=options.steps_planned,
            seed=options.diagnose.seed,
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
        final=final.pairing if final is not None else None,
        proof=final.proof if final is not None else None,
    )
    plan = _plan(target, report, outcome, files)
    if outcome.interrupted and not plan.kept and plan_file.exists():
        say(f"{plan_file} is left as it was")
    else:
        planfile.write(plan_file, plan)
    report_file = Path(".upshift") / "reports" / f"{slug(str(target.stem))}.json"
    codec.write(report_file, report)
    from upshift.report import html

    page = report_file.with_suffix(".html")
    codec.write_bytes(page, html.render_tune(report, plan=plan).encode())
    if not outcome.interrupted:
        state.file.unlink(missing_ok=True)
    return Tuned(report, plan, plan_file, report_file, page)


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
        fingerprint=fingerprint(target.name, target.arguments, device, techniques, files=files, module=target.module),
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
    )


# -- run -------------------------------------------------------------------------------------------------------------


@dataclass
class RunOptions:
    """`plan` None: the file beside the script if there is one. `require` is the least rung of the proof."""

    plan: Path | None = None
    no_plan: bool = False
    allow_stale: bool = False
    require: str = ""
    runs: Path = Path(".upshift/runs")
    quiet: bool = False


def choose_plan(target: Target, options: RunOptions) -> Chosen:
    """The plan for this script on this machine; see `hook.choosing`."""
    spec = ChildSpec(mode="run", target=target.name, arguments=target.arguments, module=target.module)
    return choosing.choose_plan(spec, _wanted(options))


def _wanted(options: RunOptions) -> choosing.Wanted:
    return choosing.Wanted(
        plan=str(options.plan or ""),
        no_plan=options.no_plan,
        allow_stale=options.allow_stale,
        require=options.require,
    )


def run(target: Target, options: RunOptions, say: Say) -> NoReturn:
    """Replace this process by the hooked script, or by a launcher whose Python processes find the hook.

    Signals, standard streams and the exit code are its own.

    Raises:
        UsageError: no such script, or a launcher that cannot be started.
        PlanError: a plan that cannot be read.
    """
    if target.starts_others:
        _launch(target, options, say)
    target.check()
    chosen = choose_plan(target, options)
    for note in chosen.notes:
        say(note)
    spec = _run_spec(target, options, {"plan_file": chosen.file, "guard": chosen.guard})
    spec = msgspec.structs.replace(spec, plan=chosen.techniques)
    RunLog(Path(spec.record)).close()
    file = Path(spec.record) / "spec.json"
    file.write_bytes(msgspec.json.encode(spec))
    env = environment(chosen.techniques)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command(file), env)


def _run_spec(target: Target, options: RunOptions, more: dict[str, Any]) -> ChildSpec:
    folder = (options.runs / new_id()).absolute()
    described = {**machine.describe(), "device": device_name(kinds_here()[0])}
    return ChildSpec(
        mode="run",
        target=target.name,
        arguments=target.arguments,
        module=target.module,
        isolate=False,
        record=str(folder),
        scratch=str(folder),
        options={"quiet": options.quiet, "environment": described, **more},
    )


def _launch(target: Target, options: RunOptions, say: Say) -> NoReturn:
    """Replace this process by a command that starts the training. Each process chooses its plan by itself."""
    from upshift.hook import launched

    if options.plan is not None:
        choosing.read_plans(options.plan)
        options = replace(options, plan=options.plan.absolute())
    spec = _run_spec(target, options, {"wanted": msgspec.to_builtins(_wanted(options))})
    folder = Path(spec.record)
    RunLog(folder).close()
    (folder / LOG).unlink()  # it was only to see that records can be written there
    (folder / "launch.json").write_bytes(msgspec.json.encode(spec))
    say(f"{target.name} starts; processes below it that train are recorded in {folder}")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(target.name, [target.name, *target.arguments], launched.environment(folder / "launch.json"))
    except OSError as error:
        raise UsageError(
            f"{target.name} cannot be started: {error.strerror}.", remedy="A shell script: upshift run -- sh NAME."
        ) from None


# -- verify ----------------------------------------------------------------------------------------------------------


@dataclass
class VerifyOptions:
    """What `verify` is asked for; see `upshift verify --help`. Times in seconds, `margin` in the metric's unit."""

    metric: str
    regex: str | None = None
    target: float | None = None
    margin: float | None = None
    seeds: int = 3
    best: bool = False
    price: float | None = None
    plan: Path | None = None
    allow_stale: bool = False
    resume: bool = False
    timeout: float = 24 * 3600.0
    allow_remote_writes: bool = False


def verify(target: Target, options: VerifyOptions, say: Say = lambda text: None) -> Verification:
    """Whole runs, stock and planned in turn, judged on the user's metric; the answer is written into the plan.

    Raises:
        UsageError: the metric was not found, or does not say which way is better.
        PlanError: there is no plan that holds for this script and machine.
        ScriptFailedError: a run failed.
    """
    from upshift.measure.metrics import Metric
    from upshift.search.verify import Options, Verifier, conclude

    target.check()
    metric = Metric.parse(options.metric, options.target, options.regex)
    chosen = choose_plan(target, RunOptions(plan=options.plan, allow_stale=options.allow_stale, require="none"))
    if not chosen.techniques:
        raise PlanError(
            f"there is nothing to verify: {'; '.join(chosen.notes)}.",
            remedy="Run upshift tune first, or name a --plan.",
        )
    plan = _plan_here(Path(chosen.file))
    device = plan.device if plan is not None else device_name(kinds_here()[0])
    files = plan.fingerprint.files if plan is not None else ()
    mark = fingerprint(target.name, target.arguments, device, chosen.techniques, files=files, module=target.module)
    wanted = Options(metric, options.seeds, options.margin, "best" if options.best else "last", options.price,
                     options.timeout)  # fmt: skip
    blank = Verification(
        script=target.name,
        arguments=target.arguments,
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
        metric=metric.name,
        mode=metric.mode,
        techniques=chosen.techniques,
        fingerprint=hashlib.sha256(codec.dumps(mark)).hexdigest(),
        seeds=options.seeds,
        margin=0.0,
        margin_note="",
        answer="not shown",
        reason="interrupted",
        target=options.target,
        price=options.price,
        take=wanted.take,
    )
    file = Path(".upshift") / "verify" / f"{slug(str(target.stem))}.json"
    earlier = _runs_before(file, blank, options) if options.resume else ()
    if earlier:
        say(f"resuming: {len(earlier)} runs are known")

    def save(runs: tuple[WholeRun, ...]) -> None:
        codec.write(file, conclude(runs, wanted, blank))

    spec = _child(
        target, DiagnoseOptions(allow_remote_writes=options.allow_remote_writes, extra={"collect": True}), "run"
    )
    runs = Verifier(
        HookRunner(extra={"PYTHONUNBUFFERED": "1"}), spec, chosen.techniques, wanted, say, save, earlier
    ).run()
    found = conclude(runs, wanted, blank)
    codec.write(file, found)
    _write_answer(Path(chosen.file), plan, found)
    return found


def _plan_here(file: Path) -> Plan | None:
    """The plan of a file for this machine; None where there is only one of another."""
    plans = planfile.read(file)
    return next((found for kind in kinds_here() if (found := plans.get(slug(device_name(kind)))) is not None), None)


def _runs_before(file: Path, blank: Verification, options: VerifyOptions) -> tuple[WholeRun, ...]:
    try:
        before = codec.read(file, Verification)
    except RecordError:
        return ()
    same = (before.fingerprint, before.metric, before.mode) == (blank.fingerprint, blank.metric, blank.mode)
    return tuple(run for run in before.runs if run.seed < options.seeds) if same else ()


def _write_answer(file: Path, plan: Plan | None, found: Verification) -> None:
    """A plan that is as good reaches the rung `metric`; one that is worse loses its proof."""
    if plan is None or plan.proof is None or found.answer == "not shown":
        return
    good = found.answer == "as good"
    proof = msgspec.structs.replace(
        plan.proof,
        rung="metric" if good else "none",
        passed=good,
        reason=f"{found.metric}: {found.answer} over {found.seeds} seeds; {found.reason}",
    )
    planfile.write(file, msgspec.structs.replace(plan, proof=proof))


# -- records ---------------------------------------------------------------------------------------------------------


def latest_run(runs: Path = Path(".upshift/runs")) -> Path:
    """The newest run folder.

    Raises:
        RecordError: there is none.
    """
    found = [path.parent for pattern in (f"*/{LOG}", f"*/*/{LOG}") for path in runs.glob(pattern)]
    if not found:
        raise RecordError(f"there is no run in {runs}.", remedy="Start one with upshift run train.py.")
    newest = max(path.relative_to(runs).parts[0] for path in found)
    # Of a launch, its first rank.
    return min(path for path in found if path.relative_to(runs).parts[0] == newest)


def load(path: Path) -> Run | TuneReport | dict[str, Plan]:
    """Whatever record lies at `path`: a run folder, a plan, or a tune report.

    Raises:
        RecordError, PlanError: it is none of these.
    """
    if path.is_dir():
        ranks = sorted(item.parent.name for item in path.glob(f"*/{LOG}"))
        if ranks and not (path / LOG).exists():
            raise RecordError(f"{path} holds several runs.", remedy=f"Name one of them: {', '.join(ranks)}.")
        return fold(path)
    if not path.exists():
        raise RecordError(f"there is no record {path}.", remedy="Name a run folder, a plan or a report.")
    if path.suffix == ".toml":
        return planfile.read(path)
    if path.name == LOG:
        return fold(path.parent)
    return codec.read(path, TuneReport)


def report_behind(plan_file: Path) -> TuneReport | None:
    """The report a plan was written with, where it is still there."""
    name = plan_file.name.removesuffix(".upshift.toml")
    for candidate in (slug(str(plan_file.parent / name)), slug(name)):
        file = Path(".upshift") / "reports" / f"{candidate}.json"
        if file.exists():
            return codec.read(file, TuneReport)
    return None


# -- the machine -----------------------------------------------------------------------------------------------------


def doctor(say: Say = lambda text: None) -> Health:
    """What of this machine stands in the way of training and of trials."""
    from upshift.errors import NotIsolatedError
    from upshift.hardware.health import look
    from upshift.hook import isolate
    from upshift.techniques.allocator import find_library

    say("looking at this machine")
    rung, problem = "", ""
    try:
        rung = isolate.probe()
    except NotIsolatedError as error:
        problem = error.message
    found = {kind: str(path) for kind in ("tcmalloc", "jemalloc") if (path := find_library(kind, os.environ))}
    return look(rung, problem, found)


def selftest(seconds: float, say: Say = lambda text: None) -> SelftestReport:
    """Trials whose truth is known, for about `seconds`: how often upshift is wrong on this machine, and what it sees.

    Ends early, with what is known by then, on KeyboardInterrupt.
    """
    from upshift.search.selftest import Selftest

    return Selftest(HookRunner(), seconds, say).run()
