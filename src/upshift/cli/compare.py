"""`upshift compare`."""

from __future__ import annotations

from pathlib import Path

import click

from upshift.cli import show


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def command(a: Path, b: Path) -> None:
    """Two run records, A and B, side by side.

    \b
    Example:
      upshift compare .upshift/runs/20260101-101500-4242 .upshift/runs/20260101-104500-4343
    """
    from upshift.records.runlog import fold
    from upshift.report import terminal

    show.console().print(terminal.render_compare(fold(a), fold(b)))
