"""verify(): whole runs judged on the user's metric."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from upshift.api.diagnosis import DiagnoseOptions, child
from upshift.api.running import RunOptions, choose_plan
from upshift.api.target import Say, Target
from upshift.errors import PlanError, RecordError
from upshift.hardware.device import device_name, kinds_here
from upshift.hook.process import HookRunner
from upshift.records import Plan, codec, planfile
from upshift.records.plan import Fingerprint, Setting
from upshift.records.planfile import slug
from upshift.records.verification import Verification, WholeRun

if TYPE_CHECKING:
    from upshift.search.verify import Options


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

    target = target.check().script
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
    wanted = Options(metric, options.seeds, options.margin, "best" if options.best else "last", options.price,
                     options.timeout)  # fmt: skip
    empty = blank(target, wanted, chosen.techniques, target.mark(chosen.techniques, device, files))
    file = Path(".upshift") / "verify" / f"{slug(str(target.stem))}.json"
    earlier = _runs_before(file, empty, options) if options.resume else ()
    if earlier:
        say(f"resuming: {len(earlier)} runs are known")

    def save(runs: tuple[WholeRun, ...]) -> None:
        codec.write(file, conclude(runs, wanted, empty))

    spec = child(
        target, DiagnoseOptions(allow_remote_writes=options.allow_remote_writes, extra={"collect": True}), "run"
    )
    runs = Verifier(
        HookRunner(extra={"PYTHONUNBUFFERED": "1"}), spec, chosen.techniques, wanted, say, save, earlier
    ).run()
    found = conclude(runs, wanted, empty)
    codec.write(file, found)
    _write_answer(Path(chosen.file), plan, found)
    return found


def blank(
    target: Target, options: Options, techniques: dict[str, dict[str, Setting]], mark: Fingerprint
) -> Verification:
    """A verification of a plan before its first run."""
    return Verification(
        script=target.name,
        arguments=target.arguments,
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
        metric=options.metric.name,
        mode=options.metric.mode,
        techniques=techniques,
        fingerprint=hashlib.sha256(codec.dumps(mark)).hexdigest(),
        seeds=options.seeds,
        margin=0.0,
        margin_note="",
        answer="not shown",
        reason="interrupted",
        target=options.metric.target,
        price=options.price,
        take=options.take,
    )


def _plan_here(file: Path) -> Plan | None:
    """The plan of a file for this machine; None where there is only one of another."""
    plans = planfile.read(file)
    return next((found for kind in kinds_here() if (found := plans.get(slug(device_name(kind)))) is not None), None)


def _runs_before(file: Path, empty: Verification, options: VerifyOptions) -> tuple[WholeRun, ...]:
    try:
        before = codec.read(file, Verification)
    except RecordError:
        return ()
    same = (before.fingerprint, before.metric, before.mode) == (empty.fingerprint, empty.metric, empty.mode)
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
