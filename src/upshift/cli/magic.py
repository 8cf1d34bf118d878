"""`%%upshift` in a notebook: the command line on the code of one cell, in a process of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upshift.errors import UpshiftError, UsageError

COMMANDS = ("diagnose", "tune", "run", "verify")

USAGE = "%%upshift diagnose|tune|run|verify [--as NAME] [OPTIONS] [-- ARGUMENTS OF THE CELL]"


class CellError(UpshiftError):
    """A cell that did not end well. IPython shows its words without the traceback of the magic."""

    def _render_traceback_(self) -> list[str]:
        return [f"upshift: {self}"]


def load(shell: Any) -> None:
    """Register `%%upshift`; called by `%load_ext upshift`."""

    def upshift(line: str, cell: str) -> None:
        try:
            run_cell(line, cell, shell.user_ns)
        except CellError:
            raise
        except UpshiftError as error:
            raise CellError(error.message, remedy=error.remedy) from None

    upshift.__doc__ = f"Run a command of upshift on this cell: {USAGE}"
    shell.register_magic_function(upshift, magic_kind="cell", magic_name="upshift")


def run_cell(line: str, cell: str, names: Mapping[str, object]) -> None:
    """Write the cell as a script and run a command on it; what it prints appears as it is printed.

    Args:
        line: what stands after `%%upshift`.
        names: of the notebook, for a hint where the cell misses one of them.

    Raises:
        CellError: the command ended with another exit code than 0.
        UsageError: a wrong line, or a cell that is not Python.
    """
    command, name, options, arguments = _parse(line)
    from upshift.api import notebook

    written = notebook.write(f"cell-{name}", [(1, cell)], title=f"The cell {name!r}", beside=Path.cwd())
    if written.dropped:
        print(f"upshift: left out: {', '.join(written.dropped)}")
    missing = ""
    # Not a session of its own: an interrupt of the kernel, or its end, reaches the training by itself.
    with (
        subprocess.Popen(
            [sys.executable, "-m", "upshift", command, *options, str(written.script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            text=True,
            errors="replace",
        ) as process,
        _interrupts_for(process),
    ):
        for text in process.stdout or ():
            print(text, end="", flush=True)
            found = re.search(r"NameError: name '(\w+)' is not defined", text)
            missing = found[1] if found else missing
    if process.returncode == 0:
        return
    if missing in names:
        raise CellError(
            f"the cell runs in a process of its own: {missing!r} of the notebook is not seen there.",
            remedy="Put everything that the training needs into the cell, or into a module that it imports.",
        )
    code = process.returncode
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    raise CellError(f"{command} ended {how}.")


@contextmanager
def _interrupts_for(process: subprocess.Popen[str]) -> Iterator[None]:
    """Leave an interrupt of the kernel to the process, which it reaches too; asked again, end the process.

    A `KeyboardInterrupt` here could fall between reading a line and printing it, and lose the line.
    """
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            process.terminate()
        asked = True  # `tune` now writes what it has

    if threading.current_thread() is not threading.main_thread():  # no interrupt arrives elsewhere
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parse(line: str) -> tuple[str, str, list[str], list[str]]:
    """Command, name of the cell, options, arguments of the script."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line!r}: {error}.", remedy=USAGE) from None
    if not words or words[0] not in COMMANDS:
        raise UsageError(f"no command of {', '.join(COMMANDS)} was named.", remedy=USAGE)
    split = words.index("--") if "--" in words else len(words)
    options, arguments = words[1:split], words[split + 1 :]
    name = "1"
    if "--as" in options:
        place = options.index("--as")
        name = options[place + 1] if place + 1 < len(options) else ""
        if not re.fullmatch(r"[a-z0-9-]+", name):
            raise UsageError("--as takes a name of small letters, digits and hyphens.", remedy=USAGE)
        del options[place : place + 2]
    return words[0], name, options, arguments
