"""run(): this process becomes the training. Its start is the user's time, so little is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from upshift.api.target import Say, Target
from upshift.errors import UsageError
from upshift.hardware import machine
from upshift.hardware.device import device_name, kinds_here
from upshift.hook import choosing
from upshift.hook.choosing import Chosen
from upshift.hook.process import command, environment
from upshift.records.runlog import LOG, RunLog, new_id
from upshift.sites.runner import ChildSpec


@dataclass
class RunOptions:
    """`plan` None: the file beside the script if there is one. `require` is the least rung of the proof.

    `tune`: seconds in which live techniques are tried inside the run, without a plan; 0 for none.
    `track`: trackers that are told of the run while it goes on, such as `tensorboard:DIR`.
    """

    plan: Path | None = None
    no_plan: bool = False
    allow_stale: bool = False
    require: str = ""
    runs: Path = Path(".upshift/runs")
    quiet: bool = False
    tune: float = 0.0
    track: tuple[str, ...] = ()


def choose_plan(target: Target, options: RunOptions) -> Chosen:
    """The plan for this script on this machine; see `hook.choosing`."""
    script = target.script
    if target.job and options.plan is None and not options.no_plan:
        if not target.plan_file.exists():
            return Chosen({}, "", (f"no plan beside {target.job}: trained as it is",))
        options = replace(options, plan=target.plan_file)
    spec = ChildSpec(mode="run", target=script.name, arguments=script.arguments, module=script.module)
    return choosing.choose_plan(spec, _wanted(options))


def _wanted(options: RunOptions) -> choosing.Wanted:
    return choosing.Wanted(
        plan=str(options.plan or ""),
        no_plan=options.no_plan,
        allow_stale=options.allow_stale,
        require=options.require,
    )


def follow(folder: Path, pid: int, track: Sequence[str], say: Say, pace: dict[str, Any] | None = None) -> None:
    """Start the process beside a run that samples resources and feeds trackers; training never waits for it.

    Args:
        pace: of the plan, where the run is one process as it was when the plan was made.
    """
    from upshift.sinks import beside

    started = beside.start(folder, pid, sinks=track, pace=pace)
    if started.reason:
        say(started.reason)


def _trackers(options: RunOptions) -> list[str]:
    """The trackers asked for, once they are known to be usable."""
    if not options.track:
        return []
    from upshift.api.tracking import check_trackers

    return check_trackers(options.track)


def run(target: Target, options: RunOptions, say: Say) -> NoReturn:
    """Replace this process by the hooked script, or by a launcher whose Python processes find the hook.

    Signals, standard streams and the exit code are its own.

    Raises:
        UsageError: no such script, a launcher that cannot be started, or options that do not go with `tune`.
        MissingExtraError: a tracker's package is not installed.
        PlanError: a plan that cannot be read.
    """
    trackers = _trackers(options)
    if options.tune:
        choosing.check_tuning(target.name, target.module, _wanted(options), launcher=target.starts_others)
        options = replace(options, no_plan=True)
    if target.starts_others:
        _launch(target, options, trackers, say)
    target.check()
    chosen = choose_plan(target, options)
    for note in () if options.tune else chosen.notes:
        say(note)
    more = {"plan_file": chosen.file, "guard": chosen.guard, "pace": chosen.pace, "tune": options.tune}
    spec = _run_spec(target, options, more)
    spec = msgspec.structs.replace(spec, plan=chosen.techniques)
    RunLog(Path(spec.record)).close()
    file = Path(spec.record) / "spec.json"
    file.write_bytes(msgspec.json.encode(spec))
    env = environment(chosen.techniques)
    follow(Path(spec.record), os.getpid(), trackers, say, chosen.pace)
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


def _launch(target: Target, options: RunOptions, trackers: list[str], say: Say) -> NoReturn:
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
    follow(folder, os.getpid(), trackers, say)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(target.name, [target.name, *target.arguments], launched.environment(folder / "launch.json"))
    except OSError as error:
        raise UsageError(
            f"{target.name} cannot be started: {error.strerror}.", remedy="A shell script: upshift run -- sh NAME."
        ) from None
