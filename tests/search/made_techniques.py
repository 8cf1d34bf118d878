"""Techniques without an effect, for searches in which only their cards and verdicts count."""

from __future__ import annotations

from typing import Any, ClassVar

from upshift.records import Measurement
from upshift.sites import Card, Numerics, Verdict


def make_technique(name: str, *, live: bool = True, numerics: Numerics = Numerics.ROUNDING, gain: float | None = 1.5,
                   applies: bool = True, saves: bool = False, conflicts: tuple[str, ...] = ()) -> Any:  # fmt: skip
    """A technique that says of itself what it is told to say, and does nothing."""
    made = Card(
        name=name, summary="", source="", sites=("forward",), numerics=numerics, saves_memory=saves,
        switchable="live" if live else "process", targets=("forward",), conflicts=conflicts,
    )  # fmt: skip

    class Made:
        card: ClassVar[Card] = made

        def numerics(self, settings: Any, facts: Any) -> Numerics:
            return made.numerics

        def check(self, seen: Measurement) -> Verdict:
            return Verdict(applies, "because", gain=gain)

        def at(self, moment: Any, settings: Any) -> None: ...

    return Made()
