"""Stated power of a logical core, idle and busy, for estimates of energy where nothing measures it."""

from __future__ import annotations

import math
import tomllib
from functools import cache
from importlib.resources import files

import msgspec

from upshift.errors import UsageError

#: More than any logical core takes: such a figure was meant for a machine.
MOST = 100.0


class Watts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Watts of one logical core that does nothing (`idle`) and of one that computes all the time (`busy`)."""

    idle: float
    busy: float
    source: str
    date: str = ""


@cache
def stated() -> Watts:
    """The range used unless the person gives one: an assumption about this machine, with its source."""
    text = files("upshift.hardware").joinpath("watts.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Watts])["vcpu"]


def parse(text: str) -> Watts:
    """`MIN:MAX`, watts of one logical core idle and busy.

    Raises:
        UsageError: not two numbers, or not 0 <= MIN < MAX <= 100.
    """
    low, colon, high = text.partition(":")
    try:
        idle, busy = float(low), float(high)
    except ValueError:
        idle = busy = math.nan
    if not colon or not 0.0 <= idle < busy <= MOST:
        raise UsageError(
            f"--watts {text!r} is no range of watts.",
            remedy="Write MIN:MAX for one logical core, idle and busy: --watts 0.7:3.5.",
        )
    return Watts(idle, busy, "as given by --watts")
