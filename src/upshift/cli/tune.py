"""`upshift tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from upshift.cli import show
from upshift.errors import DoesNotFitError


@click.command("tune", cls=show.ForTarget, context_settings=show.TARGET_SETTINGS)
@click.option("--budget", type=show.Duration(),
              help="Time the search may take.  [default: 3m, less where the training is too short to pay that back]",
              )  # fmt: skip
@click.option("--only", multiple=True, metavar="NAME", help="Try only this technique (may be repeated).")
@click.option("--without", multiple=True, metavar="NAME", help="Leave this technique out (may be repeated).")
@click.option("--untested", is_flag=True, help="Also try techniques never run on this kind of device.")
@click.option("--steps-planned", type=click.IntRange(1), help="Steps the real training will make.")
@click.option("--objective", type=click.Choice(["step", "time-to-target", "cost", "energy"]), default="step",
              show_default=True, help="What is to become smaller.")  # fmt: skip
@click.option("--metric", default="", metavar="NAME[:max|:min]",
              help="The number that counts, by the name under which the script prints or logs it.")  # fmt: skip
@click.option("--metric-regex", metavar="REGEX", help="Find it by a regular expression with one group instead.")
@click.option("--target", "goal", type=float, help="The value the metric is to reach.")
@click.option("--margin", type=click.FloatRange(min=0, min_open=True),
              help="What the final metric may lose.  [default: 1 % of the stock value]")  # fmt: skip
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True,
              help="Pairs of whole runs that decide about another training.")  # fmt: skip
@click.option("--fit", type=show.Size(),
              help="Memory the plan may need, such as 8GiB (of the accelerator, if any). Where the script needs more: "
              "the fastest plan that fits.")  # fmt: skip
@click.option("--price", type=click.FloatRange(min=0), help="Price of this machine an hour.")
@click.option("--watts", default="", metavar="MIN:MAX",
              help="Watts of one logical core, idle and busy, where energy can only be estimated.")  # fmt: skip
@click.option("--plan", "plan_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan there.")
@click.option("--dry-run", is_flag=True, help="Diagnose, say what would be tried and at what cost; write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted search.")
@click.option("--allow-remote-writes", is_flag=True, help="Let the script write to hubs and object stores.")
@click.option("--patience", type=show.Duration(), default="10m", show_default=True, help="Wait so long for a step.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write the whole report as JSON.")
@click.option("--open", "open_it", is_flag=True, help="Open the HTML report in a browser.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
@show.target_options
def command(
    budget: float | None,
    only: tuple[str, ...],
    without: tuple[str, ...],
    untested: bool,
    steps_planned: int | None,
    objective: Literal["step", "time-to-target", "cost", "energy"],
    metric: str,
    metric_regex: str | None,
    goal: float | None,
    margin: float | None,
    seeds: int,
    fit: int | None,
    price: float | None,
    watts: str,
    plan_file: Path | None,
    dry_run: bool,
    resume: bool,
    allow_remote_writes: bool,
    patience: float,
    json_file: str | None,
    open_it: bool,
    quiet: bool,
    module: str | None,
    rest: tuple[str, ...],
) -> None:
    """Try techniques on TARGET; keep what is faster and proven as good.

    Writes a plan beside the script (train.upshift.toml), which `upshift run` uses, and a report. Nothing else of
    yours is touched: what the trials write lands in scratch. Ctrl-C ends with the best plan so far.

    With --objective time-to-target (or cost, or energy) and a metric, techniques that change the training take part,
    too: a larger batch, a schedule, label smoothing, averaged weights. Whole runs over several seeds decide about
    them. Energy is measured by RAPL and NVML where these can be read, else estimated from CPU time, and labelled so.

    \b
    Examples:
      upshift tune train.py --epochs 30
      upshift tune --budget 10m --without compile train.py --epochs 30
      upshift tune --dry-run train.py
      upshift tune --objective time-to-target --metric accuracy:max --target 0.97 train.py
    """
    from upshift import api
    from upshift.report import terminal

    target = show.target(module, rest)
    options = api.TuneOptions(
        budget=budget,
        only=only,
        leave_out=without,
        untested=untested,
        steps_planned=steps_planned,
        plan_file=plan_file,
        resume=resume,
        dry_run=dry_run,
        fit=fit,
        objective=api.Objective(objective, metric, metric_regex, goal, margin, seeds, price, watts),
        diagnose=api.DiagnoseOptions(allow_remote_writes=allow_remote_writes, patience=patience),
    )
    console = show.console()

    def diagnosed(found: api.Diagnosed) -> None:
        if not quiet:
            show.say(found.verdict)

    with show.Progress(quiet) as say:
        tuned = api.tune(target, options, say, diagnosed, show.say)
    if dry_run:
        show.say(tuned.report.verdict)
        return
    console.print(terminal.render_tune(tuned.report, str(tuned.page or tuned.report_file), plan=tuned.plan))
    if json_file:
        show.write_json(json_file, tuned.report)
    if open_it and tuned.page is not None:
        show.open_page(tuned.page)
    if tuned.report.interrupted:
        raise KeyboardInterrupt
    if tuned.report.fitted is not None and not tuned.report.fitted.fits:
        allow = "Allow more time with --budget, more memory" if tuned.report.fitted.untried else "Allow more"
        raise DoesNotFitError(
            tuned.report.verdict, remedy=f"{allow} with --fit, or use smaller batches or a smaller model."
        )
