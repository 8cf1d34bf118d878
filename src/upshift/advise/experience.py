"""How far earlier estimates were off on this machine: a file that grows by one line for each that was measured.

`$XDG_CACHE_HOME/upshift/estimates.jsonl`, else `~/.cache/upshift/estimates.jsonl`. Lines that cannot be read are passed
over; a cache that cannot be written costs only the memory of this one estimate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from upshift.records.estimate import Error
from upshift.records.quantity import Quantity, unknown
from upshift.units import percent

#: Of a longer file the end is read; a longer line is not one of ours.
MOST_BYTES, MAX_LINE = 1 << 20, 1 << 14

#: Fewer say nothing about the next one.
LEAST = 1


def default_file() -> Path:
    """Where the errors of earlier estimates are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return folder / "upshift" / "estimates.jsonl"


def append(errors: Sequence[Error], file: Path | None = None) -> bool:
    """Remember how far estimates were off; False where that could not be written."""
    path = default_file() if file is None else file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as opened:
            # One write, so that two processes do not tear each other's lines; a torn end becomes a line of its own.
            opened.write(b"".join(b"\n" + msgspec.json.encode(item) + b"\n" for item in errors))
    except OSError:
        return False
    return True


def read(file: Path | None = None) -> tuple[Error, ...]:
    """The errors remembered, oldest first; none where there is no such file."""
    path = default_file() if file is None else file
    try:
        with open(path, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(size - MOST_BYTES, 0))
            data = opened.read(MOST_BYTES)
    except OSError:
        return ()
    found = []
    for line in data.split(b"\n"):
        if not line or len(line) > MAX_LINE:
            continue
        try:
            item = msgspec.json.decode(line, type=Error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if math.isfinite(item.measured) and math.isfinite(item.predicted) and item.measured > 0 < item.predicted:
            found.append(item)
    return tuple(found)


def error(errors: Sequence[Error], what: str, device: str) -> Quantity:
    """Median of the relative errors (without sign) of earlier estimates of `what` on `device`, as a fraction.

    `high` is the largest of the nine smallest tenths; `n` how many there were.
    """
    found = sorted(abs(item.relative) for item in errors if item.what == what and item.device == device)
    if len(found) < LEAST:
        return unknown("fraction")
    middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
    return Quantity(value=middle, unit="fraction", low=found[0], high=found[math.ceil(0.9 * len(found)) - 1],
                    n=len(found), level=0.9)  # fmt: skip


def sentence(errors: Sequence[Error], device: str) -> str:
    """What earlier estimates on this device were off by, for people; empty where none was ever measured."""
    parts = []
    for what in ("step", "memory"):
        found = error(errors, what, device)
        if found.value is None:
            continue
        text = f"{what} by {percent(found.value)}"
        if found.n > 1 and found.high is not None:
            text += f" (median of {found.n}; nine in ten within {percent(found.high)})"
        parts.append(text)
    return f"earlier estimates here were off: {', '.join(parts)}" if parts else ""
