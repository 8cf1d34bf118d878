"""Stated peaks of a few accelerators, with source and date. Estimated context, never a measurement."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

import msgspec


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One accelerator as its maker states it: dense FLOP/s per dtype, bytes of memory, bytes per second."""

    match: tuple[str, ...]
    memory: float
    bandwidth: float
    source: str
    date: str
    bfloat16: float | None = None
    float16: float | None = None
    tf32: float | None = None
    float32: float | None = None


@cache
def devices() -> dict[str, Device]:
    """Every device in the catalogue, by its short name."""
    text = files("upshift.hardware").joinpath("catalog.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Device])


def find(name: str) -> tuple[str, Device] | None:
    """The entry for a device name as the driver reports it; None where there is none (never the nearest one).

    A partition of a device (MIG) has only part of its peak, so it is not in the catalogue.
    """
    if " MIG " in f" {name} ":
        return None
    words = f" {name.lower().strip()}"
    for key, device in devices().items():
        # Only at the end of the name: what follows it ("D", "Laptop GPU", "NVL") is another device.
        if any(words.endswith(f" {fragment.lower()}") for fragment in device.match):
            return key, device
    return None
