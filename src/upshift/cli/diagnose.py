"""`upshift diagnose`."""

from __future__ import annotations

from pathlib import Path

import click

from upshift.cli import show


@click.command("diagnose", cls=show.ForTarget, context_settings=show.TARGET_SETTINGS)
@click.option("--seconds", type=show.Duration(), default="20s", show_default=True, help="Watch for at most this long.")
@click.option("--trace", type=click.Path(dir_okay=False), help="Also write a PyTorch-profiler trace of three steps.")
@click.option("--html", "page", type=click.Path(dir_okay=False), help="Also write the diagnosis as an HTML page.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write the measurement as JSON.")
@click.option("--no-probe", is_flag=True, help="Do not measure this machine's peaks (no floor then).")
@click.option("--allow-remote-writes", is_flag=True, help="Let the script write to hubs and object stores.")
@click.option("--patience", type=show.Duration(), default="10m", show_default=True, help="Wait so long for a step.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
@show.target_options
def command(
    seconds: float,
    trace: str | None,
    page: str | None,
    json_file: str | None,
    no_probe: bool,
    allow_remote_writes: bool,
    patience: float,
    quiet: bool,
    module: str | None,
    rest: tuple[str, ...],
) -> None:
    """Where the time of TARGET goes, what would help, and what is the floor.

    The script runs as it is, isolated from your files, until enough has been seen; then it is stopped.

    \b
    Examples:
      upshift diagnose train.py --epochs 3
      upshift diagnose --trace trace.json -m package.train --config small.yaml
    """
    from upshift import api
    from upshift.report import html, terminal

    options = api.DiagnoseOptions(
        seconds=min(seconds, 600.0),
        trace=trace or "",
        probe=not no_probe,
        allow_remote_writes=allow_remote_writes,
        patience=patience,
    )
    with show.Progress(quiet) as say:
        found = api.diagnose(show.target(module, rest), options, say)
    console = show.console()
    console.print(terminal.render_diagnosis(found.measurement, found.findings, found.verdict, console.width))
    if json_file:
        show.write_json(json_file, found.measurement)
    if page:
        Path(page).write_text(html.render_diagnosis(found.measurement, found.findings, found.verdict), "utf-8")
        show.say(f"page: {page}")
