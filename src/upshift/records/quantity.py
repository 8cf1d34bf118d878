"""A number that says where it comes from."""

from __future__ import annotations

from typing import Literal

import msgspec

Basis = Literal["measured", "estimated", "unknown"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all records: immutable, strict when read back."""


class Quantity(Record, frozen=True):
    """A value with unit, interval, count and basis. Unknown is `None`, never zero.

    `low`/`high` bound the value at confidence `level` (two-sided); `n` is the number of observations.
    """

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 0
    basis: Basis = "measured"
    level: float = 0.95

    @property
    def known(self) -> bool:
        """Whether there is a value at all."""
        return self.value is not None

    def or_else(self, default: float) -> float:
        """The value, or `default` where it is unknown (for ordering only, never for display)."""
        return default if self.value is None else self.value


def unknown(unit: str) -> Quantity:
    """Not seen."""
    return Quantity(value=None, unit=unit, basis="unknown")


def estimated(value: float, unit: str, low: float | None = None, high: float | None = None) -> Quantity:
    """Computed from other figures, not observed."""
    return Quantity(value=value, unit=unit, low=low, high=high, basis="estimated")
