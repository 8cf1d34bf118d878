"""What the commands share: the target, durations, the progress line, files and consoles. All on stderr."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from upshift.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from upshift.api import Target

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

#: Our own long options, for a hint when one is found after TARGET.
OURS = ("--budget", "--only", "--without", "--dry-run", "--plan", "--no-plan", "--allow-stale", "--require",
        "--steps-planned", "--trace", "--quiet", "--json")  # fmt: skip


class Duration(click.ParamType):  # type: ignore[type-arg]
    """`90`, `90s`, `3m`, `1h`: seconds as a float."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a duration."""
        if isinstance(value, (int, float)):
            return float(value)
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|)\s*", str(value))
        if not found:
            self.fail(f"{value!r} is not a duration; write 90s, 3m or 1h.", param, ctx)
        seconds = float(found[1]) * _UNITS[found[2]]
        if seconds <= 0:
            self.fail("a duration must be more than zero.", param, ctx)
        return seconds


class Size(click.ParamType):  # type: ignore[type-arg]
    """`8GiB`, `512 MiB`, `8GB`: bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size; a bare number is refused, since nobody knows in what."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", str(value), re.IGNORECASE)
        if not found or float(found[1]) <= 0:
            self.fail(f"{value!r} is not a size; write 8GiB or 512MiB.", param, ctx)
        power = "KMGT".index(found[2].upper()) + 1
        unit = 1024.0 if found[3] else 1000.0
        return round(float(found[1]) * unit**power)


class ForTarget(click.Command):
    """A command whose options end at `-m MODULE`, too: what follows belongs to the module, as after a script."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Mark where the options end."""
        valued = {name for item in self.params if isinstance(item, click.Option) and not item.is_flag
                  for name in item.opts}  # fmt: skip
        place = 0
        while place < len(args) and args[place].startswith("-") and args[place] != "--":
            name = args[place]
            place += 2 if name in valued else 1
            if name.startswith("-m") and place <= len(args):
                return super().parse_args(ctx, [*args[:place], "--", *args[place:]])
        return super().parse_args(ctx, args)


#: Everything from TARGET on belongs to the script.
TARGET_SETTINGS = {
    "ignore_unknown_options": False,
    "allow_interspersed_args": False,
    "help_option_names": ["-h", "--help"],
}


def target_options(command: Any) -> Any:
    """`-m` and the rest of the line."""
    command = click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="TARGET [ARGS]...")(command)
    return click.option("-m", "module", metavar="MODULE", help="Run a module, as python -m does.")(command)


def target(module: str | None, rest: tuple[str, ...]) -> Target:
    """The target of a command line.

    Raises:
        UsageError: there is none.
    """
    from upshift.api import Target

    if module:
        found = Target(module, tuple(rest), module=True)
    elif rest:
        found = Target(_script(rest[0]), tuple(rest[1:]))
    else:
        raise UsageError("no script was named.", remedy="upshift COMMAND [OPTIONS] train.py [ARGS OF THE SCRIPT]")
    for item in found.arguments:
        if item.partition("=")[0] in OURS:
            say(f"note: {item} stands after {found.name}, so it goes to the script; upshift's options come before it")
            break
    return found


def _script(name: str) -> str:
    """The script to run: of a notebook its code cells, with a note on what is left out."""
    if not name.endswith(".ipynb"):
        return name
    from upshift.api import notebook

    converted = notebook.convert(Path(name))
    left_out = f"; left out: {', '.join(converted.dropped)}" if converted.dropped else ""
    say(f"{name}: its code cells, as {converted.script}{left_out}")
    return str(converted.script)


def safe(text: str) -> str:
    """Text of unknown origin without control characters that could drive a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def say(text: str) -> None:
    """One line on stderr."""
    click.echo(f"upshift: {safe(text)}", err=True)


def console() -> Console:
    """A console on stderr; NO_COLOR is honoured, colour only on a terminal."""
    from rich.console import Console

    width = None if sys.stderr.isatty() else min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    return Console(stderr=True, width=width, highlight=False)


class Progress:
    """A live status line on a terminal, sparse lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._console = console()
        self._live = self._console.is_terminal and not quiet
        self._status: Any = None
        self._last = 0.0
        self._seen = ""

    def __enter__(self) -> Callable[[str], None]:
        if self._live:
            self._status = self._console.status("")
            self._status.__enter__()
        return self.say

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """Show what is going on."""
        if self.quiet:
            return
        from rich.text import Text

        clean = safe(text)
        if self._status is not None:
            self._status.update(Text(clean))
            return
        # Without a terminal a line now and then is enough; repeated counters are not lines.
        kind = re.sub(r"\d+", "#", clean)
        now = time.monotonic()
        if kind != self._seen or now - self._last > 10:
            self._seen, self._last = kind, now
            click.echo(f"upshift: {clean}", err=True)


def write_json(path: str, record: Any) -> None:
    """Write a record as JSON to a file."""
    from upshift.errors import EnvironmentError_
    from upshift.records import codec

    try:
        codec.write(Path(path), record)
    except OSError as error:
        raise EnvironmentError_(f"{path} cannot be written: {error.strerror}.", remedy="Name another file.") from None


def open_page(path: Path) -> None:
    """Open a page in the person's browser."""
    import webbrowser

    webbrowser.open(path.absolute().as_uri())
