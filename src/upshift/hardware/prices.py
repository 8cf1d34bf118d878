"""What machines cost to rent: a person's own offers, SkyPilot's catalogue, a small table with source and date.

Nothing here asks the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from upshift.errors import UsageError
from upshift.hardware import own
from upshift.hardware.catalog import Device, devices, own_files, pick
from upshift.hardware.offer import LIMITS, Offer
from upshift.hardware.own import Source
from upshift.hardware.skypilot import from_skypilot

__all__ = ["Offer", "for_device", "from_skypilot", "known", "offers"]

_WORDS = ("provider", "instance", "device", "region", "currency", "source", "date")


def offers(files: Sequence[Path] = ()) -> tuple[Offer, ...]:
    """Offers of own `files`, the first one first, then those that are shipped and not replaced by them.

    Raises:
        UsageError: a file that cannot be read, or a price that cannot be right.
    """
    return _merged(*_own(files), _shipped())


def known(
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    sky: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Offer, ...]:
    """All offers there are here: own files, then SkyPilot's catalogue, then what is shipped.

    Args:
        folder, environ: see `own_files`.
        sky, say: see `from_skypilot`.
    """
    return _merged(*_own(own_files(folder, environ)), from_skypilot(sky, say=say), _shipped())


def for_device(name: str, among: Iterable[Offer]) -> tuple[Offer, ...]:
    """Offers of a device, the cheapest for each device first; those without a price last."""
    mine = [offer for offer in among if offer.device == name]

    def order(offer: Offer) -> tuple[bool, float, int, str]:
        return offer.per_device is None, offer.per_device or 0.0, offer.count, offer.provider

    return tuple(sorted(mine, key=order))


def _merged(*layers: Sequence[Offer]) -> tuple[Offer, ...]:
    """Offers of each layer, but for machines that a layer before it has."""
    found: list[Offer] = []
    for layer in layers:
        have = {(offer.provider, offer.instance) for offer in found}
        found += [offer for offer in layer if (offer.provider, offer.instance) not in have]
    return tuple(found)


@cache
def _shipped() -> tuple[Offer, ...]:
    tables = own.shipped("prices.toml")
    named = own.sources(tables, Path("prices.toml"))
    return tuple(_offer(item, named, f"[[offers]] {n}") for n, item in enumerate(tables["offers"], 1))


def _own(files: Sequence[Path]) -> list[tuple[Offer, ...]]:
    names: dict[str, Device] | None = None
    found = []
    for path in files:
        tables = own.read(path)
        listed = tables.get("offers", [])
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise UsageError(f"{own.shown(path)}: offers is no list of tables.", remedy="Write [[offers]] above each.")
        if listed and names is None:
            names = devices(files)
        named = own.sources(tables, path)
        where = f"[[offers]] {{}} of {own.shown(path)}"
        found.append(tuple(_offer(item, named, where.format(n), names) for n, item in enumerate(listed, 1)))
    return found


def _offer(
    table: dict[str, Any], named: Mapping[str, Source], where: str, names: Mapping[str, Device] | None = None
) -> Offer:
    """An offer as a table says it; a device is looked up in `names`."""
    said: dict[str, Any] = {}
    for key, value in table.items():
        if key in LIMITS:
            low, high, what, unit = LIMITS[key]
            said[key] = own.number(key, value, (low, high, what), unit, where)
        elif key in _WORDS:
            said[key] = own.text(key, value, where)
        else:
            raise UsageError(f"unknown key {own.short(key)} in {where}.", remedy=own.meant(key, (*LIMITS, *_WORDS)))
    for key in ("provider", "instance", "hour"):
        if not said.get(key):
            raise UsageError(f"{key} is missing in {where}.", remedy="Give provider, instance and hour.")
    if said.get("device") and names is not None:
        try:
            said["device"] = pick(said["device"], names)[0]
        except UsageError as error:
            raise UsageError(f"{where}: {error.message}", remedy=error.remedy) from None
    said["count"] = int(said.get("count", 1 if said.get("device") else 0))
    found = own.source(said.pop("source", ""), said.pop("date", ""), named)
    return Offer(source=found.text, date=found.date, **said)
