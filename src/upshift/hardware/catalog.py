"""Stated figures of accelerators and processors, with source and date. Estimated context, never a measurement.

They are kept in `catalog.toml`. A person's own file may add devices or override single figures of them:
`.upshift/hardware.toml` of a project goes before `~/.config/upshift/hardware.toml`, both before what is shipped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from upshift.errors import UsageError
from upshift.hardware import own
from upshift.hardware.own import Source, own_files

__all__ = ["Device", "Source", "devices", "find", "lookup", "own_files", "pick"]

#: Peaks from wide to narrow; FLOP/s, for int8 OP/s.
PEAKS = ("float64", "float32", "tf32", "bfloat16", "float16", "float8", "int8")

#: Figure -> its unit.
FIGURES: dict[str, str] = {
    **dict.fromkeys(PEAKS, "FLOP/s"),
    "int8": "OP/s",
    "memory": "B",
    "bandwidth": "B/s",
    "interconnect": "B/s",
    "power": "W",
    "cores": "cores",
    "price": "",
}

KINDS = ("gpu", "tpu", "accelerator", "cpu")

#: Figure -> the least and the most that any device has, and what it is called.
LIMITS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(PEAKS, (1e9, 1e17, "peak")),
    "memory": (1e8, 1e14, "size of a memory"),
    "bandwidth": (1e9, 1e15, "memory bandwidth"),
    "interconnect": (1e8, 1e15, "bandwidth between devices"),
    "power": (0.5, 1e5, "power of a device"),
    "cores": (1, 1e5, "number of cores"),
    "price": (1, 1e8, "price of a device"),
}

_WORDS = ("kind", "title", "capability", "note", "currency", "source", "date")
_LISTS = ("match", "aliases")


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device as its maker states it. None: unknown.

    Peaks in FLOP/s per dtype (int8: OP/s), dense; `memory` in bytes; `bandwidth` of it, and `interconnect` each way to
    the other devices of a node, in bytes per second; `power` in watts; `price` of one in `currency`; `capability` is
    CUDA's. `source` and `date` hold for every figure that has none of its own in `sources`.
    """

    source: str
    date: str
    match: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    kind: str = "gpu"
    title: str = ""
    capability: str = ""
    note: str = ""
    memory: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None
    power: float | None = None
    cores: float | None = None
    price: float | None = None
    currency: str = "USD"
    float64: float | None = None
    float32: float | None = None
    tf32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None
    float8: float | None = None
    int8: float | None = None
    sources: dict[str, Source] = {}

    def figures(self) -> dict[str, float]:
        """Every figure that is known, in the order of `FIGURES`."""
        found = {name: getattr(self, name) for name in FIGURES}
        return {name: value for name, value in found.items() if value is not None}

    def peaks(self) -> dict[str, float]:
        """Dense FLOP/s (int8: OP/s) per dtype, as far as they are known."""
        return {name: value for name, value in self.figures().items() if name in PEAKS}

    def source_of(self, figure: str) -> Source:
        """Where a figure (or `capability`) was read."""
        return self.sources.get(figure) or Source(self.source, self.date)


def devices(files: Sequence[Path] = ()) -> dict[str, Device]:
    """Every device by its short name: what is shipped, overridden and added to by own `files`, the first goes first.

    Raises:
        UsageError: a file that cannot be read, or a figure that cannot be right; both are named.
    """
    known = dict(_shipped())
    for path in reversed(files):
        tables = own.read(path)
        named = own.sources(tables, path)
        for name, table in own.section(tables, "devices", path).items():
            if not plain(name):
                raise UsageError(
                    f"{own.short(name)} is no name of a device, in {own.shown(path)}.",
                    remedy="Give it one with letters or digits: [devices.NAME].",
                )
            same = next((key for key, device in known.items() if plain(name) in _names(key, device)), name)
            known[same] = _device(table, known.get(same), named, f"[devices.{name}] of {own.shown(path)}")
    return known


def find(name: str, known: Mapping[str, Device] | None = None) -> tuple[str, Device] | None:
    """The entry for a device name as the driver reports it; None where there is none (never the nearest one).

    A partition of a device (MIG) has only part of its peak, so it is not in the catalogue.
    """
    if " MIG " in f" {name} ":
        return None
    words = f" {name.lower().strip()}"
    for key, device in (_shipped() if known is None else known).items():
        # Only at the end of the name: what follows it ("D", "Laptop GPU", "NVL") is another device.
        if any(fragment and words.endswith(f" {fragment.lower()}") for fragment in device.match):
            return key, device
    return None


def lookup(name: str, known: Mapping[str, Device]) -> tuple[str, ...]:
    """Short names that a person may have meant: the exact one alone, else all that the words fit. Empty: none."""
    wanted = plain(name)
    if not wanted:
        return ()
    for key, device in known.items():
        if wanted in (*_names(key, device), plain(device.title)):
            return (key,)
    if (found := find(name, known)) is not None:
        return (found[0],)
    words = set(_split(name))
    return tuple(
        key
        for key, device in known.items()
        if (len(wanted) > 1 and plain(key).startswith(wanted)) or words <= {*_split(key), *_split(device.title)}
    )


def pick(name: str, known: Mapping[str, Device]) -> tuple[str, Device]:
    """The device a person named.

    Raises:
        UsageError: there is none of that name, or several.
    """
    found = lookup(name, known)
    if len(found) == 1:
        return found[0], known[found[0]]
    if found:
        raise UsageError(
            f"{own.short(name)} could be {len(found)} devices: {', '.join(found)}.", remedy="Name one of them."
        )
    near = close(name, known)
    raise UsageError(
        f"no device in the catalogue is called {own.short(name)}.",
        remedy=(f"Did you mean {' or '.join(near)}? " if near else "")
        + f"`upshift explain` lists them; [devices.NAME] in .upshift/{own.FILE} adds one.",
    )


def close(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names that look like the one that was written."""
    names = {item.lower(): item for item in known}
    return [names[item] for item in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)]


def plain(name: str) -> str:
    """A name without case, spaces and signs: `RTX 4090` and `rtx-4090` are one."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())


@cache
def _shipped() -> dict[str, Device]:
    tables = own.shipped("catalog.toml")
    named = own.sources(tables, Path("catalog.toml"))
    return {name: _device(table, None, named, f"[devices.{name}]") for name, table in tables["devices"].items()}


def _device(table: dict[str, Any], base: Device | None, named: Mapping[str, Source], where: str) -> Device:
    """A device as a table says it, over `base` where that is overridden."""
    said = {key: _value(key, value, where) for key, value in table.items() if key != "from"}
    whole = own.source(said.pop("source", ""), said.pop("date", ""), named)
    singles = table.get("from", {})
    if not isinstance(singles, dict):
        raise UsageError(f"from is no table in {where}.", remedy='Write from = { power = "where it was read" }.')
    given = [key for key in said if key in FIGURES or key == "capability"]
    if unread := [key for key in singles if key not in given]:
        raise UsageError(f"from names {own.short(unread[0])}, which {where} does not give.", remedy="Remove it.")
    single = {key: own.source(own.text("from", item, where), "", named) for key, item in singles.items()}
    if base is None:
        return Device(source=whole.text, date=whole.date, sources=single, **said)
    # What was not said anew keeps the source it had.
    return msgspec.structs.replace(base, **said, sources={**base.sources, **dict.fromkeys(given, whole), **single})


def _value(key: str, value: Any, where: str) -> Any:
    """What one line of a device's table says."""
    if key in FIGURES:
        return own.number(key, value, LIMITS[key], FIGURES[key], where)
    if key in _LISTS:
        if not isinstance(value, list):
            raise UsageError(f"{key} is no list in {where}.", remedy=f'Write {key} = ["..."].')
        return tuple(own.text(key, item, where) for item in value)
    if key not in _WORDS:
        known = (*FIGURES, *_WORDS, *_LISTS)
        raise UsageError(f"unknown key {own.short(key)} in {where}.", remedy=own.meant(key, known))
    found = own.text(key, value, where)
    if key == "kind" and found not in KINDS:
        raise UsageError(f"kind {own.short(found)} in {where}.", remedy=f"Known: {', '.join(KINDS)}.")
    return found


def _names(key: str, device: Device) -> tuple[str, ...]:
    return (plain(key), *map(plain, device.aliases))


def _split(name: str) -> list[str]:
    return re.findall(r"[a-z0-9+]+", name.lower())
