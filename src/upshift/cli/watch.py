"""`upshift watch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from upshift.cli import show

if TYPE_CHECKING:
    from upshift.report.current import Moment

#: A snapshot as JSON is written anew after so many seconds.
JSON_EVERY = 5.0


@click.command("watch")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--once", is_flag=True, help="Show how it stands now, and end.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False),
              help="Write the figures as JSON, anew every few seconds.")  # fmt: skip
@click.option("--price", metavar="PRICE", help="What an hour of this machine costs: 2.5, or 'EUR 2.5/h'.")
@click.option("--region", metavar="REGION", help="Where its electricity comes from, for the carbon: FR, US.")
@click.option("--every", type=show.Duration(), default="1s", show_default=True, help="Time between two looks.")
def command(
    run: Path | None, once: bool, json_file: str | None, price: str | None, region: str | None, every: float
) -> None:
    """How a run stands: loss, speed, time left, utilisation, memory, power, cost so far. Without RUN: the newest.

    Looking changes nothing, and Ctrl-C only ends the looking. Ends by itself when the run does. Without a terminal,
    and with --once, it says once how the run stands.

    \b
    Examples:
      upshift watch
      upshift watch --price 2.5 --region FR .upshift/runs/20260101-101500-4242
      upshift watch --once --json now.json
    """
    from upshift.api import watching
    from upshift.hardware.rates import rates
    from upshift.report import current, live

    folder = watching.find(run)
    known = rates(price=price, region=region)
    console = show.console()
    if once or not console.is_terminal or console.is_dumb_terminal:
        moment = watching.once(folder, known)
        console.print(live.render(moment))
        if json_file:
            show.write_json(json_file, current.snapshot(moment))
        return

    from rich.live import Live

    last: Moment | None = None
    written = 0.0
    ended = False
    try:
        # A screen of its own, as of top or less: it can be redrawn in any size, and leaves the terminal as it was.
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as screen:
            for last in watching.watch(folder, every=every, rates=known):
                screen.update(live.render(last), refresh=True)
                if json_file and time.monotonic() - written >= JSON_EVERY:
                    show.write_json(json_file, current.snapshot(last))
                    written = time.monotonic()
            ended = True
    except KeyboardInterrupt:
        pass
    if last is None:
        show.say("stopped watching; the run itself was left alone")
        return
    console.print(live.render(last))
    if json_file:
        show.write_json(json_file, current.snapshot(last))
    if ended:
        show.say("the run is over")
    else:
        show.say("stopped watching; the run itself was left alone")
