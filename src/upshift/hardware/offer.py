"""A machine to rent, and what its figures may be."""

from __future__ import annotations

import msgspec

#: Figure -> the least and the most there is, what it is called, its unit.
LIMITS: dict[str, tuple[float, float, str, str]] = {
    "count": (0, 1e5, "number of devices", "devices"),
    "vcpus": (1, 1e5, "number of vCPUs", "vCPUs"),
    "memory": (1e8, 1e15, "size of a memory", "B"),
    "hour": (1e-4, 1e5, "price of a machine an hour", "an hour"),
    "spot": (1e-4, 1e5, "price of a machine an hour", "an hour"),
}


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine to rent: `count` devices of the catalogue's name `device` (empty: no accelerator).

    `hour` on demand and `spot` are for the whole machine, in `currency` an hour; `memory` of the host in bytes.
    None: unknown.
    """

    provider: str
    instance: str
    source: str
    date: str = ""
    device: str = ""
    count: int = 0
    vcpus: float | None = None
    memory: float | None = None
    hour: float | None = None
    spot: float | None = None
    region: str = ""
    currency: str = "USD"

    @property
    def per_device(self) -> float | None:
        """On demand, for each device; None where that is not known."""
        return self.hour / self.count if self.hour is not None and self.count else None
