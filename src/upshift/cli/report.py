"""`upshift report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from upshift.cli import show

if TYPE_CHECKING:
    from upshift.records.ledger import Ledger
    from upshift.records.resources import Resources


@click.command("report")
@click.argument("record", type=click.Path(path_type=Path), required=False)
@click.option("--open", "open_it", is_flag=True, help="Write the HTML page and open it in a browser.")
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write the HTML page there.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the record as JSON.")
@click.option("--text", is_flag=True, help="Print on the terminal (the default).")
def command(record: Path | None, open_it: bool, page: Path | None, json_file: str | None, text: bool) -> None:
    """Draw any record again: a run folder, a plan, a tune report. Without RECORD: the newest run.

    \b
    Examples:
      upshift report
      upshift report train.upshift.toml --open
      upshift report .upshift/runs/20260101-101500-4242 --json run.json
    """
    from upshift import api
    from upshift.api import watching
    from upshift.errors import UsageError
    from upshift.records import Run, TuneReport
    from upshift.report import html, live, terminal

    path = record if record is not None else api.latest_run()
    found = api.load(path)
    console = show.console()
    drawn: str | None = None
    subject: Run | TuneReport | None = None
    used: Resources | None = None
    books: Ledger | None = None
    if isinstance(found, dict):
        for plan in found.values():
            console.print(terminal.render_plan(plan))
        subject = api.report_behind(path)
        if subject is None and (open_it or page or json_file):
            raise UsageError(
                f"the report behind {path} is not here.", remedy="Run this where upshift tune ran, or tune again."
            )
    else:
        subject = found
        if isinstance(found, Run):
            console.print(terminal.render_run(found))
            used, books = watching.books(path.parent if path.is_file() else path, found)
            if used is not None:
                console.print(live.render_books(books))
        else:
            console.print(terminal.render_tune(found))
    if subject is None:
        return
    if json_file:
        show.write_json(json_file, subject)
    if open_it or page:
        if isinstance(subject, Run):
            drawn = html.render_run(subject, resources=used, ledger=books)
        else:
            drawn = html.render_tune(subject)
        target = page or Path(".upshift") / "reports" / f"{path.name}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(drawn, "utf-8")
        show.say(f"page: {target}")
        if open_it:
            show.open_page(target)
