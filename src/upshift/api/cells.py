"""Notebook cells as plain Python: IPython's own syntax is dropped, kept as a comment, or refused.

A line is only touched where Python's parser stops at it, so that a `%` at the start of a continued line stays.
Source: ipython.readthedocs.io/en/stable/interactive/magics.html
"""

from __future__ import annotations

import re
import warnings

from upshift.errors import UsageError

#: Cell magics whose cell is ordinary Python that runs once.
_RUN_ONCE = ("time", "capture", "prun", "upshift")

#: Magics that change what the following code does -> what to write instead.
_REFUSED = {
    "run": "import the module",
    "load": "paste the code",
    "pylab": "import numpy and matplotlib",
    "cd": "os.chdir(...)",
    "env": 'os.environ["NAME"] = "value"',
    "set_env": 'os.environ["NAME"] = "value"',
}

_REMEDY = "Write Python there, or give the cell the tag skip-execution."


def plain_python(source: str, place: str) -> tuple[str, tuple[str, ...]]:
    """The Python of one cell, with as many lines as it had, and the lines that were dropped.

    Args:
        place: what to call the cell in an error.

    Raises:
        UsageError: a line is not Python and cannot be left out.
    """
    lines = source.splitlines()
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if lines and lines[first].startswith("%%"):
        if _word(lines[first]) not in _RUN_ONCE:
            return "\n".join(f"# {line}" for line in lines), (lines[first],)
        lines[first] = f"# {lines[first]}"
    dropped: list[str] = []
    touched: set[int] = set()
    while (wrong := _stops_at("\n".join(lines), place)) is not None:
        number, reason = wrong
        line = lines[number]
        text = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if number in touched or not (text.startswith(("%", "!", "?")) or text.endswith("?")):
            raise UsageError(f"{place}, line {number + 1} is not Python: {text} ({reason}).", remedy=_REMEDY)
        touched.add(number)
        name = _word(text)
        if text.startswith("%") and name in _REFUSED:
            raise UsageError(f"{place}, line {number + 1}: {text} means nothing to a script.",
                             remedy=f"Write Python instead: {_REFUSED[name]}.")  # fmt: skip
        if text.startswith("%") and name == "time" and text.partition(" ")[2]:
            lines[number] = indent + text.partition(" ")[2].lstrip()
            continue
        dropped.append(text)
        lines[number] = f"{indent}pass  # {text}"
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = lines[number]
            lines[number] = f"# {line}"
    return "\n".join(lines), tuple(dropped)


def _word(magic: str) -> str:
    found = re.match(r"%*(\w*)", magic)
    return found[1] if found else ""


def _stops_at(source: str, place: str) -> tuple[int, str] | None:
    """The line (from 0) at which the parser stops, and why; None where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, place, "exec", dont_inherit=True)
    except SyntaxError as error:
        last = max(source.count("\n"), 0)
        return min(max((error.lineno or 1) - 1, 0), last), error.msg
    return None
