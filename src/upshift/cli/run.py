"""`upshift run`."""

from __future__ import annotations

from pathlib import Path

import click

from upshift.cli import show
from upshift.errors import UsageError


@click.command("run", cls=show.ForTarget, context_settings=show.TARGET_SETTINGS)
@click.option("--plan", "plan_file", type=click.Path(dir_okay=False, path_type=Path), help="Use this plan.")
@click.option("--no-plan", is_flag=True, help="Train the script as it is; only record.")
@click.option("--allow-stale", is_flag=True, help="Use the plan although script, device or versions have changed.")
@click.option(
    "--require",
    type=click.Choice(["none", "update", "trajectory", "metric"]),
    help="The least rung of the proof a plan must have reached.  [default: trajectory, or update where labelled]",
)
@click.option(
    "--tune",
    type=show.Duration(),
    help="Try techniques inside this run for so long; what is faster and shown to be harmless stays on.",
)
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), default=Path(".upshift/runs"),
              show_default=True, help="Where to keep the record.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              help="Job: the run folder (record, checkpoints).  [default: a new one below --runs]")  # fmt: skip
@click.option("--resume", type=click.Choice(["auto", "never", "force"]), default="auto", show_default=True,
              help="Job: go on from the newest good checkpoint; force: only its weights.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Job: change a field or argument of it.")
@click.option("--nproc", type=click.IntRange(1), default=1, help="Job: so many processes on this machine (torchrun).")
@click.option("--parallel", type=click.Choice(["ddp", "fsdp2"]), default="ddp", show_default=True,
              help="Job: how several processes share the model.")  # fmt: skip
@click.option("--device", default="", help="Job: cpu, cuda.  [default: an accelerator where there is one]")
@click.option("--micro-batch", metavar="N|auto", help="Job: samples of one forward and backward pass; auto: the "
              "fastest that fits, tried in processes of their own.  [default: all of a process's share]")  # fmt: skip
@click.option("--fit", type=show.Size(), help="Job: with --micro-batch auto, the memory it may take: 8GiB.")
@click.option("--workers", type=click.IntRange(0), help="Job: loader processes.")
@click.option("--save-every", metavar="N|DURATION", help="Job: steps (500) or time (10m) between checkpoints.  "
              "[default: from what saving costs]")  # fmt: skip
@click.option("--interruptions", type=show.Duration(), default=86_400.0, metavar="DURATION",
              help="Job: expected time between two interruptions.  [default: a day; spot machines: 2h]")  # fmt: skip
@click.option("--grace", type=show.Duration(), default=30.0, metavar="DURATION",
              help="Job: time between SIGTERM and the end.  [default: 30s]")  # fmt: skip
@click.option("--notice", default="", metavar="COMMAND", help="Job: exits with 0 when the machine will be taken away.")
@click.option("--track", multiple=True, metavar="TRACKER[:PLACE]", help="Also tell tensorboard, wandb, mlflow or "
              "prometheus, from a process beside the run.")  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; only record.")
@show.target_options
def command(
    plan_file: Path | None,
    no_plan: bool,
    allow_stale: bool,
    require: str | None,
    tune: float | None,
    runs: Path,
    out: Path | None,
    resume: str,
    settings: tuple[str, ...],
    nproc: int,
    parallel: str,
    device: str,
    micro_batch: str | None,
    fit: int | None,
    workers: int | None,
    save_every: str | None,
    interruptions: float,
    grace: float,
    notice: str,
    track: tuple[str, ...],
    quiet: bool,
    module: str | None,
    rest: tuple[str, ...],
) -> None:
    """Train TARGET with its plan: guarded, monitored, recorded.

    The script behaves as under python: arguments, exit code, exceptions, signals, standard streams. If the loss
    stops being finite, or a technique raises, the techniques come off and training goes on without them.

    TARGET may be a launcher: it is started as it is, and every Python process below it that trains gets the plan of
    its script and a record of its own.

    TARGET may be a job declared in Python, jobs.py:NAME. It is saved as it goes, and the same command with the same
    --out goes on exactly where it was stopped: after Ctrl-C, SIGTERM (exit code 143), a crash or a power cut.

    With --tune a run without a plan tunes itself: techniques that can be switched between two steps alternate in its
    first minutes, and all steps are its own. This shows less than upshift tune does.

    \b
    Examples:
      upshift run train.py --epochs 30
      upshift run --plan fast.toml --require trajectory train.py
      upshift run --no-plan train.py
      upshift run --tune 5m train.py
      upshift run --track tensorboard:logs train.py
      upshift run -- torchrun --nproc-per-node 2 train.py
      upshift run --out runs/cifar jobs.py:cifar
      upshift run --out runs/cifar --nproc 2 --set epochs=3 jobs.py:cifar
      upshift run torchrun --nproc-per-node 2 jobs.py:cifar
    """
    from upshift import api

    say = (lambda text: None) if quiet else show.say
    target = show.target(module, rest)
    if target.job:
        if tune is not None:
            raise UsageError("--tune works on scripts.", remedy=f"Make a plan first: upshift tune {target.job}")
        steps, seconds = _save_every(save_every)
        execution = api.Settings(
            resume=resume, device=device, micro_batch=_micro_batch(micro_batch, fit),
            loader={"num_workers": workers} if workers is not None else {}, save_seconds=seconds, save_steps=steps,
            interruption_seconds=interruptions, grace=grace, notice=notice, parallel=parallel,
        )  # fmt: skip
        job = api.JobOptions(
            execution, out=out, runs=runs, settings=api.parse_settings(tuple(f"--set={item}" for item in settings)),
            plan=plan_file, no_plan=no_plan, allow_stale=allow_stale, require=require or "",
            search_micro_batch=micro_batch == "auto", fit=fit, processes=nproc, track=track, quiet=quiet,
        )  # fmt: skip
        api.run_job(target, job, say)
    if not module and not Path(target.name).exists() and not target.starts_others:
        raise UsageError(
            f"there is no script {target.name}, and no program of that name.", remedy="Check the path, and PATH."
        )
    _only_for_jobs(fit=fit, out=out, settings=settings, nproc=nproc > 1, device=device, micro_batch=micro_batch,
                   workers=workers, save_every=save_every, notice=notice)  # fmt: skip
    options = api.RunOptions(
        plan=plan_file, no_plan=no_plan, allow_stale=allow_stale, require=require or "", runs=runs, quiet=quiet,
        tune=tune or 0.0, track=track,
    )  # fmt: skip
    api.run(target, options, say)


def _save_every(text: str | None) -> tuple[int | None, float | None]:
    """Steps or seconds between two checkpoints."""
    if text is None:
        return None, None
    if text.isdecimal() and int(text) > 0:
        return int(text), None
    return None, show.Duration().convert(text, None, None)


def _micro_batch(text: str | None, fit: int | None) -> int | None:
    """A number of samples; None for none and for `auto`."""
    if fit is not None and text != "auto":
        raise UsageError("--fit is the limit of a search.", remedy="--micro-batch auto --fit 8GiB")
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--micro-batch {text} is no number of samples.", remedy="--micro-batch 64, or auto.")
    return int(text)


def _only_for_jobs(**given: object) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, "", (), False)]
    if named:
        raise UsageError(
            f"{', '.join(named)} needs a job; a script has its own way.", remedy="Declare the training: jobs.py:NAME."
        )
