"""The command line: parse, call one api function, render. Only `cli` prints or exits."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from upshift.errors import UpshiftError

#: Command -> module with a click command of that name, and its one line for --help (so that --help loads nothing).
COMMANDS = {
    "diagnose": "Where the time of a training script goes, and what would help.",
    "tune": "Try techniques on a script; keep what is faster and proven as good.",
    "run": "Train with the plan: guarded, monitored, recorded.",
    "verify": "Whole runs, with and without the plan: is your own metric as good?",
    "watch": "A run in the terminal, live.",
    "compare": "Runs side by side: performance, time, cost, energy, carbon.",
    "report": "Draw any record again.",
    "checkpoints": "What a run can be resumed from: verified, listed, exported.",
    "estimate": "Memory, time and cost of a training on other hardware.",
    "explain": "The catalogue of techniques, findings and devices.",
    "doctor": "Is this machine fit, and how often would upshift be wrong on it?",
}

EPILOG = """\b
Options go before TARGET; everything after it belongs to the script.
  upshift diagnose train.py --epochs 3
  upshift tune --budget 5m train.py --epochs 30
  upshift run train.py --epochs 30
  upshift report --open
\b
Exit codes: 0 done ("keep your baseline" too), 1 beyond a limit (compare), 2 usage,
3 plan or record unreadable, 4 no training seen, 5 the script failed, 6 disk or permissions,
7 not isolated, 8 package missing, 9 not shown to be as good (verify), 10 checkpoint unwritable
or unreadable, 11 data unreadable, 12 the loss stays not finite, 13 nothing fits (tune --fit),
75 a rank was lost (try again), 130 Ctrl-C, 143 SIGTERM (a job can be resumed).
`upshift run` exits as the script does."""


class Lazy(click.Group):
    """Commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order a person meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"upshift.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Lazy, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="upshift")
def cli() -> None:
    """Makes PyTorch training faster and cheaper on an unmodified script, and proves it."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors end in a sentence, a remedy and a documented exit code."""
    try:
        code: Any = cli.main(args=arguments, prog_name="upshift", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("upshift: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UpshiftError as error:
        from upshift.cli.show import safe

        click.echo(f"upshift: {safe(error.message)}", err=True)
        if error.remedy:
            click.echo(f"         {safe(error.remedy)}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("upshift: interrupted", err=True)
        sys.exit(130)
