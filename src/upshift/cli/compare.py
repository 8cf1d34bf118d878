"""`upshift compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from upshift.cli import show

if TYPE_CHECKING:
    from upshift.records.comparison import Comparison

#: Where `--open` writes the page without `--html`.
PAGE = Path(".upshift") / "reports" / "compare.html"


@click.command("compare")
@click.option("--metric", metavar="NAME[:max|:min]",
              help="The number that counts.  [default: a metric all runs have, else the training loss]")  # fmt: skip
@click.option("--target", "goal", type=float, help="Also compare the time until the metric reaches this.")
@click.option("--price", metavar="PRICE", help="Price of the machine an hour: 2.5, EUR 2.5/h.")
@click.option("--region", metavar="REGION", help="Where the power comes from, for the carbon.")
@click.option("--pue", type=float, help="Energy of the building over that of its machines.")
@click.option("--names", metavar="A,B", help="What the approaches are called, in order.")
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML page.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the comparison as JSON.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Write Markdown, for a pull request.")  # fmt: skip
@click.option("--open", "open_it", is_flag=True, help="Open the HTML page in a browser.")
@click.option("--fail-if", "fail_if", multiple=True, metavar="LIMIT",
              help="Exit with 1 where a later run is beyond a limit: 'step>+2%', 'metric<-0.01'; may be repeated.",
              )  # fmt: skip
@click.option("--strict", is_flag=True, help="Beyond a limit is enough, also where its interval is not.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN [RUN]...")
def command(
    metric: str | None,
    goal: float | None,
    price: str | None,
    region: str | None,
    pue: float | None,
    names: str | None,
    page: Path | None,
    json_file: str | None,
    markdown_file: Path | None,
    open_it: bool,
    fail_if: tuple[str, ...],
    strict: bool,
    runs: tuple[str, ...],
) -> int:
    """Runs side by side: what they reached, what that cost, and which differences are more than chance.

    RUN is a run folder, or a folder of run folders: repeated seeds of one approach. The first is what the others are
    compared with. One run each is never evidence; times need runs that took turns. Exit code 1: beyond a limit of
    --fail-if; 2: a limit on a figure that is not known.

    \b
    Examples:
      upshift compare .upshift/runs/20260101-101500-4242 .upshift/runs/20260101-104500-4343
      upshift compare --metric accuracy:max --target 0.97 --price 2.5 --html compare.html stock/ planned/
      upshift compare --fail-if 'step>+2%' --fail-if 'metric<-0.01' --markdown comment.md main/ branch/
    """
    from upshift.api import comparing
    from upshift.report import compared

    options = comparing.CompareOptions(
        metric=metric, target=goal, price=price, region=region, pue=pue,
        names=names.split(",") if names is not None else (), fail_if=fail_if, strict=strict,
    )  # fmt: skip
    found = comparing.compare(runs, options)
    show.console().print(compared.render_compare(found))
    if json_file:
        show.write_json(json_file, found)
    if markdown_file:
        _write(markdown_file, compared.markdown(found))
    if page or open_it:
        from upshift.report import compare_page

        target = page or PAGE
        _write(target, compare_page.render_compare(found))
        show.say(f"page: {target}")
        if open_it:
            show.open_page(target)
    return _code(found)


def _code(found: Comparison) -> int:
    """1: a limit is broken; 2: one cannot be held against anything, which is no pass; 0 else."""
    outcomes = {gate.outcome for gate in found.gates}
    for gate in found.gates:
        if gate.outcome != "passed":
            show.say(f"{gate.outcome}: {gate.text}: {gate.approach}: {gate.reason}")
    return 1 if "failed" in outcomes else 2 if "unknown" in outcomes else 0


def _write(path: Path, text: str) -> None:
    """Write a file atomically, its folder made where it is missing."""
    from upshift.errors import EnvironmentError_
    from upshift.records import codec

    try:
        codec.write_bytes(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise EnvironmentError_(f"{path} cannot be written: {error.strerror}.", remedy="Name another file.") from None
