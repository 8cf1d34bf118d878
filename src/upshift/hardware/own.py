"""Files of hardware: those of this package, and a person's own, which is read with checks that name file and key.

A figure is given in its plain unit (bytes, B/s, FLOP/s, W). One that can only have been meant in another is refused,
with what to write.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from upshift.errors import UsageError

FILE = "hardware.toml"

#: Larger than any such file.
MAX_BYTES = 1 << 20

#: `[here]` holds what this machine costs, and is read elsewhere.
TABLES = ("sources", "devices", "offers", "here")

#: Data sheets' units by which a figure is multiplied, if it is below the first number.
_SCALES: dict[str, tuple[tuple[float, float], ...]] = {
    "memory": ((4096, 1e9), (math.inf, 2.0**20)),  # GB, else the MiB that drivers report
    "bandwidth": ((20, 1e12), (math.inf, 1e9)),  # TB/s, else GB/s
    "interconnect": ((20, 1e12), (math.inf, 1e9)),
    "power": ((math.inf, 1e-3),),  # mW, as drivers report
}


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was read, and of when it is (a year, a day, or the day it was read). Empty date: not known."""

    text: str
    date: str = ""


def own_files(folder: Path | None = None, environ: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """A person's own files that are there: the project's, then the person's.

    Args:
        folder: where `.upshift/` lies; None: the working directory.
        environ: None: that of this process.
    """
    environ = os.environ if environ is None else environ
    places = [(Path() if folder is None else folder) / ".upshift" / FILE]
    config, home = environ.get("XDG_CONFIG_HOME", ""), environ.get("HOME", "")
    if Path(config).is_absolute():
        places.append(Path(config) / "upshift" / FILE)
    elif home:
        places.append(Path(home) / ".config" / "upshift" / FILE)
    return tuple(path for path in places if os.path.lexists(path))


def shipped(name: str) -> dict[str, Any]:
    """The tables of a file of this package."""
    return tomllib.loads(files("upshift.hardware").joinpath(name).read_text(encoding="utf-8"))


def read(path: Path) -> dict[str, Any]:
    """The tables of a person's file.

    Raises:
        UsageError: it cannot be read, is no TOML, or has a table that nothing reads.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{shown(path)} cannot be read: {error.strerror}.", remedy="Check the file.") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError("it is larger than any such file")
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{shown(path)} is not TOML: {' '.join(str(error).split())}.", remedy="Mend it.") from None
    for name in tables:
        if name not in TABLES:
            raise UsageError(f"{shown(path)} has an unknown table {short(name)}.", remedy=meant(name, TABLES))
    return tables


def section(tables: Mapping[str, Any], name: str, path: Path) -> dict[str, dict[str, Any]]:
    """The named tables under `name`; empty where there are none."""
    found = tables.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(item, dict) for item in found.values()):
        raise UsageError(f"{shown(path)}: {name} holds no tables.", remedy=f"Write [{name}.NAME] and lines below it.")
    return found


def sources(tables: Mapping[str, Any], path: Path) -> dict[str, Source]:
    """The sources that a file names by key; the empty key is the file itself."""
    found = {"": Source(f"as given in {shown(path)}")}
    for key, item in section(tables, "sources", path).items():
        try:
            found[key] = msgspec.convert(item, Source)
        except msgspec.ValidationError:
            raise UsageError(
                f"[sources.{key}] of {shown(path)} is no source.", remedy='Write text = "..." and date = "2026-01".'
            ) from None
    return found


def source(key: str, date: str, known: Mapping[str, Source]) -> Source:
    """The source a key names, or a text that stands for itself."""
    found = known.get(key) or Source(key)
    return Source(found.text, date) if date else found


def number(name: str, value: Any, limits: tuple[float, float, str], unit: str, where: str) -> float:
    """A figure from a file.

    Args:
        limits: the least and the most there is, and what it is called.

    Raises:
        UsageError: no number, or none that can be right; the remedy says what was probably meant.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(
            f"{name} is no number in {where}.", remedy=f"Write a plain number{f' of {unit}' * bool(unit)}."
        )
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    low, high, what = limits
    if low <= found <= high:
        return found
    likely = _rescaled(name, found, unit)
    if likely is not None and low <= likely <= high:
        remedy = f"Write {name} = {f'{likely:.6g}'.replace('e+', 'e')}, which is in {unit}."
    else:
        remedy = f"From {low:g} to {high:g} {unit}".strip() + " is possible."
    raise UsageError(f"{name} {found:g} {unit}".strip() + f" is no {what}, in {where}.", remedy=remedy)


def text(name: str, value: Any, where: str) -> str:
    """A text from a file, on one line."""
    if not isinstance(value, str) or len(value) > 1000:
        raise UsageError(f"{name} is no text in {where}.", remedy='Write it in quotes: "...".')
    return " ".join(value.split())


def meant(name: str, known: Sequence[str]) -> str:
    """A hint for a word that is not known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."


def shown(path: Path) -> str:
    """The file as people know it, without the way to it."""
    if path.name == FILE and path.parent.name in (".upshift", "upshift"):
        return f".upshift/{FILE}" if path.parent.name == ".upshift" else f"~/.config/upshift/{FILE}"
    return path.name


def short(name: object) -> str:
    """A name in quotes, cut where it is long."""
    line = " ".join(str(name).split())
    return repr(line if len(line) <= 60 else line[:59] + "…")


def _rescaled(name: str, value: float, unit: str) -> float | None:
    """The figure, taken for one in the unit that data sheets use."""
    scales = _SCALES.get(name, ((math.inf, 1e12),) if unit.endswith("OP/s") else ())
    return next((value * scale for below, scale in scales if value < below), None)
