"""How well several ranks use what they have: their samples per second against as many times those of one."""

from __future__ import annotations

from upshift import units
from upshift.records.quantity import Quantity, unknown


def efficiency(together: float, world: int, alone: float | None) -> Quantity:
    """Scaling efficiency: 1 means that `world` ranks do `world` times the work of one.

    Args:
        together: samples per second of all ranks, measured.
        world: number of ranks.
        alone: samples per second of one rank on the same kind of device, measured; None where it was not.

    Raises:
        ValueError: a rate or number of ranks that is not positive.
    """
    if world < 1 or together <= 0 or (alone is not None and alone <= 0):
        raise ValueError(f"need positive rates and ranks, got {together}, {world}, {alone}")
    if alone is None:
        return unknown("ratio")
    return Quantity(value=together / (world * alone), unit="ratio", n=1)


def sentence(together: float, world: int, alone: float | None) -> str:
    """What the record says of it."""
    found = efficiency(together, world, alone)
    ranks = f"{world} ranks: {units.si(together, 'samples/s')}"
    if found.value is None or alone is None:
        return f"{ranks}; scaling efficiency unknown, one rank alone was not measured"
    return (
        f"{ranks}, {units.percent(found.value)} of {world} times one rank alone "
        f"({units.si(alone, 'samples/s')}), measured"
    )
