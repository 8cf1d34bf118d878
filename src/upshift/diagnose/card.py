"""What can be said about a kind of finding without a measurement: its name, what it means, where it is from."""

from __future__ import annotations

import msgspec


class FindingCard(msgspec.Struct, frozen=True):
    """One diagnosis rule, for `explain`.

    `triggers` says on which figures it speaks, `limits` when it may be wrong or silent.
    """

    name: str
    summary: str
    source: str
    triggers: str
    limits: str = ""
    techniques: tuple[str, ...] = ()
