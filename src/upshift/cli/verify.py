"""`upshift verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from upshift.cli import show
from upshift.errors import NotShownError, UsageError

if TYPE_CHECKING:
    from upshift.api import ResumeOptions, Target

_REMEDY = {
    "worse": "The plan has lost its proof; upshift run trains the baseline.",
    "not shown": "More --seeds or a wider --margin may show it; --resume keeps the runs made.",
}


@click.command("verify", cls=show.ForTarget, context_settings=show.TARGET_SETTINGS)
@click.option("--metric", metavar="NAME[:max|:min]",
              help="The number that counts, by the name under which the script prints or logs it.")  # fmt: skip
@click.option("--metric-regex", metavar="REGEX", help=r"Find it by a regular expression with one group instead.")
@click.option("--target", "goal", type=float, help="Also compare the time until the metric reaches this.")
@click.option("--margin", type=click.FloatRange(min=0, min_open=True),
              help="What may be lost and still be as good, in the metric's unit.  [default: 1 % of the stock value]",
              )  # fmt: skip
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True, help="Pairs of whole runs.")
@click.option("--take", type=click.Choice(["last", "best"]), default="last", show_default=True,
              help="Which value of a run counts.")  # fmt: skip
@click.option("--price", type=click.FloatRange(min=0), help="Price of this machine an hour, for the cost of a run.")
@click.option("--plan", "plan_file", type=click.Path(dir_okay=False, path_type=Path), help="Verify this plan.")
@click.option("--allow-stale", is_flag=True, help="Verify the plan although script, device or versions have changed.")
@click.option("--resume", is_flag=True,
              help="Go on with an interrupted verification. A job without --metric: is it resumed bit for bit?",
              )  # fmt: skip
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True,
              help="With --resume jobs.py:NAME: length of the runs that are compared.")  # fmt: skip
@click.option("--times", type=click.IntRange(1), default=3, show_default=True,
              help="With --resume jobs.py:NAME: interruptions, at random steps.")  # fmt: skip
@click.option("--nproc", type=click.IntRange(1), default=1, help="With --resume jobs.py:NAME: processes.")
@click.option("--timeout", type=show.Duration(), default="24h", show_default=True, help="The longest a run may take.")
@click.option("--allow-remote-writes", is_flag=True, help="Let the script write to hubs and object stores.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
@show.target_options
def command(
    metric: str | None,
    metric_regex: str | None,
    goal: float | None,
    margin: float | None,
    seeds: int,
    take: str,
    price: float | None,
    plan_file: Path | None,
    allow_stale: bool,
    resume: bool,
    steps: int,
    times: int,
    nproc: int,
    timeout: float,
    allow_remote_writes: bool,
    json_file: str | None,
    quiet: bool,
    module: str | None,
    rest: tuple[str, ...],
) -> None:
    """Whole runs of TARGET, with and without its plan, over several seeds: is the result as good?

    The metric is found in what the script prints, in CSV and JSON files it writes, and in what it logs to TensorBoard
    or Weights & Biases. Nothing of yours is touched: what the runs write lands in scratch. A plan that is as good
    reaches the rung `metric`; one that is worse is marked, and `upshift run` trains the baseline.
    Exit code 9: not shown to be as good.

    verify --resume jobs.py:NAME trains a declared job at one go and with interruptions at random steps, and compares
    the final states: "bit-exact", or what is not (exit code 9).

    \b
    Examples:
      upshift verify --metric accuracy:max train.py --epochs 5
      upshift verify --metric 'val loss:min' --target 1.5 --seeds 5 --price 2.10 train.py
      upshift verify --metric acc:max --metric-regex 'Acc@1 ([\\d.]+)' train.py
      upshift verify --resume jobs.py:cifar
    """
    from upshift import api
    from upshift.report import verified

    found = show.target(module, rest)
    if metric is None:
        if not (resume and found.job):
            raise UsageError("which number counts is not said.", remedy="--metric accuracy:max")
        _resumes(found, api.ResumeOptions(steps=steps, times=times, processes=nproc), quiet)
        return
    options = api.VerifyOptions(
        metric=metric,
        regex=metric_regex,
        target=goal,
        margin=margin,
        seeds=seeds,
        best=take == "best",
        price=price,
        plan=plan_file,
        allow_stale=allow_stale,
        resume=resume,
        timeout=timeout,
        allow_remote_writes=allow_remote_writes,
    )
    with show.Progress(quiet) as say:
        result = api.verify(found, options, say)
    show.console().print(verified.render_verify(result))
    if json_file:
        show.write_json(json_file, result)
    if result.answer != "as good":
        raise NotShownError(f"{result.answer}: {result.reason}.", remedy=_REMEDY[result.answer])


def _resumes(target: Target, options: ResumeOptions, quiet: bool) -> None:
    """Is a job resumed bit for bit?"""
    from upshift import api

    with show.Progress(quiet) as say:
        found = api.verify_resume(target, options, say)
    stops = ", ".join(map(str, found.stops))
    if found.exact:
        show.say(f"bit-exact: {found.steps} steps, stopped after {stops} and gone on with, end in the same state")
        return
    shown = ", ".join(found.differs[:8]) + (f" and {len(found.differs) - 8} more" if len(found.differs) > 8 else "")
    raise NotShownError(
        f"not bit-exact: {found.steps} steps, stopped after {stops}, end in another {shown}.",
        remedy="Look for state outside of the job: a global counter, a generator of its own, data that changes.",
    )
