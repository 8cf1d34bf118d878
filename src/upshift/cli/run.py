"""`upshift run`."""

from __future__ import annotations

from pathlib import Path

import click

from upshift.cli import show


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
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; only record.")
@show.target_options
def command(
    plan_file: Path | None,
    no_plan: bool,
    allow_stale: bool,
    require: str | None,
    tune: float | None,
    runs: Path,
    quiet: bool,
    module: str | None,
    rest: tuple[str, ...],
) -> None:
    """Train TARGET with its plan: guarded, monitored, recorded.

    The script behaves as under python: arguments, exit code, exceptions, signals, standard streams. If the loss
    stops being finite, or a technique raises, the techniques come off and training goes on without them.

    TARGET may be a launcher: it is started as it is, and every Python process below it that trains gets the plan of
    its script and a record of its own.

    With --tune a run without a plan tunes itself: techniques that can be switched between two steps alternate in its
    first minutes, and all steps are its own. This shows less than upshift tune does.

    \b
    Examples:
      upshift run train.py --epochs 30
      upshift run --plan fast.toml --require trajectory train.py
      upshift run --no-plan train.py
      upshift run --tune 5m train.py
      upshift run -- torchrun --nproc-per-node 2 train.py
    """
    from upshift import api

    options = api.RunOptions(
        plan=plan_file, no_plan=no_plan, allow_stale=allow_stale, require=require or "", runs=runs, quiet=quiet,
        tune=tune or 0.0,
    )  # fmt: skip
    api.run(show.target(module, rest), options, (lambda text: None) if quiet else show.say)
