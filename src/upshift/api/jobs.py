"""Declared jobs: `run(job)` in this process, and `upshift run jobs.py:NAME`, which makes a process of its own."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from upshift.api.running import RunOptions, choose_plan, follow
from upshift.api.target import ENTRY, Say, Target, bare_settings
from upshift.api.tracking import check_trackers
from upshift.engine.settings import Settings, extended
from upshift.errors import PlanError, UsageError
from upshift.hardware import machine
from upshift.hardware.device import device_name, kinds_here
from upshift.hook import choosing
from upshift.hook.process import environment
from upshift.records import Plan
from upshift.records.plan import Setting
from upshift.records.runlog import new_id

if TYPE_CHECKING:
    from upshift.engine.job import Job
    from upshift.engine.run import Result

#: The variable that holds the spec of a job's process, as JSON.
SPEC = "UPSHIFT_JOB"


class JobSpec(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process is asked to do with a job. Travels as JSON; nothing in it can import or execute anything."""

    out: str = ""
    settings: dict[str, str] = {}
    plan: dict[str, dict[str, Setting]] = {}
    plan_file: str = ""
    quiet: bool = False
    environment: dict[str, str] = {}
    track: list[str] | None = None
    """Trackers of the run; None: nothing is sampled beside it either."""
    pace: dict[str, Any] | None = None
    """Of the plan, where the steps can be held against it."""


@dataclass
class JobOptions:
    """How `upshift run` trains a job."""

    execution: Settings = field(default_factory=Settings)
    out: Path | None = None
    runs: Path = Path(".upshift/runs")
    settings: dict[str, str] = field(default_factory=dict)
    plan: Path | None = None
    no_plan: bool = False
    allow_stale: bool = False
    require: str = ""
    search_micro_batch: bool = False
    """Find the micro-batch by trying sizes (`fit` bytes at most)."""
    fit: int | None = None
    processes: int = 1
    track: tuple[str, ...] = ()
    quiet: bool = False


def run_job(target: Target, options: JobOptions, say: Say) -> NoReturn:
    """Replace this process by the training of a job, or by torchrun where several processes are asked for.

    Raises:
        UsageError: no such file, or options that do not go together.
        PlanError: a plan that cannot be read.
    """
    reference = target.job
    track = check_trackers(options.track) if options.track else []
    launcher = _launcher(target, options)
    settings = {**options.settings, **_settings_behind(target)}
    chosen = _chosen(target, settings, options)
    for note in chosen.notes:
        say(note)
    micro_batch = _micro_batch(target, settings, options, chosen, launcher, say)
    env = environment(chosen.techniques)
    folder = (options.out or options.runs / new_id()).absolute()
    described = {**machine.describe(), "device": device_name(kinds_here()[0])}
    spec = extended(
        JobSpec, msgspec.structs.replace(options.execution, micro_batch=micro_batch), out=str(folder),
        settings=settings, plan=chosen.techniques, plan_file=chosen.file, quiet=options.quiet, environment=described,
        track=track, pace=_pace(chosen, options, launcher),
    )  # fmt: skip
    env[SPEC] = msgspec.json.encode(spec).decode()
    command = [*launcher, "-m", ENTRY, reference] if launcher else [sys.executable, "-m", ENTRY, reference]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, env)
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be started: {error.strerror}.", remedy="Install torch.") from None


def owned(spec: JobSpec, out: Path, say: Say) -> None:
    """Called in the process that owns the run folder, of a group in its first rank: the run can be looked at now."""
    if spec.track is None:
        return
    pid = os.getpid()
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1) > 1:
        # What started the ranks has them all below it; it outlives those it starts anew.
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0:
            return
        pid = os.getppid()
    follow(out, pid, spec.track, say, spec.pace)


def _pace(chosen: choosing.Chosen, options: JobOptions, launcher: list[str]) -> dict[str, Any] | None:
    """What the steps are held against: the plan's, where they are executed as they were when it was made."""
    execution = options.execution
    as_tuned = not (launcher or options.search_micro_batch or execution.micro_batch or execution.loader)
    return chosen.pace if as_tuned and not execution.device else None


def _launcher(target: Target, options: JobOptions) -> list[str]:
    """The command in front of the job: what the person wrote, or torchrun for `--nproc`."""
    if target.starts_others:
        place = target.arguments.index(target.job)
        return [target.name, *target.arguments[:place]]
    if options.processes > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3",
                "--nproc-per-node", str(options.processes)]  # fmt: skip
    return []


def _micro_batch(target: Target, settings: dict[str, str], options: JobOptions, chosen: choosing.Chosen,
                 launcher: list[str], say: Say) -> int | None:  # fmt: skip
    """The micro-batch of this run: as given, or searched."""
    if not options.search_micro_batch:
        return options.execution.micro_batch
    if launcher and options.processes == 1:
        raise UsageError(
            "--micro-batch auto has to know how many processes there are.", remedy="Use --nproc N in place of torchrun."
        )
    from upshift.engine.probing import find_micro_batch
    from upshift.engine.reference import load_job

    job = load_job(target.job, settings)
    share = -(-job.global_batch // options.processes)
    limit = options.fit // options.processes if options.fit is not None else None
    found = find_micro_batch(
        target.job, share, limit=limit, device=options.execution.device, settings=settings, plan=chosen.techniques,
        say=say,
    )  # fmt: skip
    say(str(found))
    if found.warning:
        say(found.warning)
    return found.size


def _settings_behind(target: Target) -> dict[str, str]:
    """`--set key=value` behind the name of the job."""
    behind = target.arguments
    if target.starts_others:
        behind = behind[behind.index(target.job) + 1 :]
    return parse_settings(behind)


def parse_settings(arguments: tuple[str, ...]) -> dict[str, str]:
    """`--set key=value ...` as a dictionary.

    Raises:
        UsageError: something else stands there.
    """
    found: dict[str, str] = {}
    for item in bare_settings(arguments):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"a job has no argument {item!r}.", remedy="Change its fields with --set KEY=VALUE.")
        found[key] = value
    return found


def _chosen(target: Target, settings: dict[str, str], options: JobOptions) -> choosing.Chosen:
    """The plan, if it was measured on this job with these settings."""
    asked = Target(target.job, tuple(f"{key}={value}" for key, value in settings.items()))
    wanted = RunOptions(
        plan=options.plan, no_plan=options.no_plan, allow_stale=options.allow_stale, require=options.require
    )
    return choose_plan(asked, wanted)


def run(job: Job, plan: Plan | Path | None = None, *, out: str | Path | None = None, resume: str = "auto",
        say: Say | None = None, **execution: Any) -> Result:  # fmt: skip
    """Train a job in this process, with a plan or without.

    Args:
        plan: a plan, or the file of one.
        out: the run folder (record and checkpoints); None: nothing is written.
        execution: see `upshift.engine.settings.Execution`.

    Raises:
        UpshiftError: see `upshift.engine.run.train_job`.
    """
    from upshift.engine.run import train_job
    from upshift.engine.settings import Execution

    techniques: dict[str, dict[str, Setting]] = {}
    if isinstance(plan, (str, Path)):
        plans = choosing.read_plans(Path(plan))
        if len(plans) != 1:
            raise PlanError(f"{plan} holds plans for {len(plans)} devices.", remedy="Hand over one of them.")
        (plan,) = plans.values()
    if plan is not None:
        techniques = plan.techniques
    outside = {name: "it acts on the environment a process starts with: upshift run jobs.py:NAME does that"
               for name in techniques if _only_environment(name)}  # fmt: skip
    settings = Execution(
        out=Path(out) if out is not None else None, resume=resume, plan=techniques,
        say=say or (lambda text: None), **execution,
    )  # fmt: skip
    return train_job(job, settings, outside)


def _only_environment(name: str) -> bool:
    from upshift.techniques import registry

    return registry.get(name).card.sites == ("process_env",)


def tune(job: Job | str, *, budget: float | None = None, say: Say | None = None) -> Plan | None:
    """Search a plan for a job, in processes of its own, as `upshift tune jobs.py:NAME` does.

    Args:
        job: `jobs.py:NAME`, or a job that is a global of a file: the processes import that file.
        budget: seconds.

    Returns:
        The plan (it may say: keep your baseline), also written beside the file; None where nothing was tried.

    Raises:
        UsageError: the job is no global of a file, or its file tunes it while it is imported.
        UpshiftError: see `upshift.api.tune`.
    """
    from upshift.api.tuning import TuneOptions
    from upshift.api.tuning import tune as search

    reference = job if isinstance(job, str) else _reference_of(job)
    return search(Target(reference), TuneOptions(budget=budget), say or (lambda text: None)).plan


def _reference_of(job: Job) -> str:
    """`FILE.py:NAME` of a job that is a global of a loaded module."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not str(file).endswith(".py"):
            continue
        for key, value in list(vars(module).items()):
            if value is job and not key.startswith("_"):
                if name != "__main__" and ENTRY in sys.orig_argv:
                    raise UsageError(
                        f"{file} tunes its job while it is imported.",
                        remedy='Put the call under `if __name__ == "__main__":`.',
                    )
                return f"{file}:{key}"
    raise UsageError(
        "this job is no global of a file, and the trials run in processes of their own.",
        remedy="Bind it to a name at the top of a file: cifar = Job(…).",
    )
