"""Which technique is suspected first of harm: the least exact kind, then the coarsest precision."""

from __future__ import annotations

from upshift.sites.protocol import Numerics

#: From the least to the most that can go wrong.
RISK = {Numerics.BITWISE: 0, Numerics.ROUNDING: 1, Numerics.RESEEDS: 2, Numerics.CHANGES_TRAINING: 3}

#: Precisions from fine to coarse.
COARSE = ("optimizer", "float32", "bfloat16")


def suspicion(numerics: Numerics, precision: str) -> tuple[int, int]:
    """Sorts techniques; the largest is suspected first."""
    return RISK[numerics], COARSE.index(precision)
