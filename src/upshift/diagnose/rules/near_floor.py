"""The step is near the least time this machine allows."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import known
from upshift.records import Finding, Measurement, Quantity
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="near_floor",
    summary="The step is near this machine's floor: nothing much to gain by execution.",
    source="Williams, Waterman and Patterson 2009, Roofline",
    triggers="the arithmetic (fastest usable dtype) or bandwidth floor is 70 % of the step or more",
    limits="A floor from a lower bound of the FLOPs is itself low. Silent where the peak could only be estimated, and "
    "where the floor lies more than 10 % above the step, since then the peak is wrong.",
)
LEAST = 0.7
#: No step beats its floor: one far above the step rests on a wrong peak.
MOST = 1.1


def rule(m: Measurement) -> Finding | None:
    """Speaks on the higher of the two floors against the step."""
    floor, step = m.floor, known(m.anatomy.step)
    if floor is None or not step:
        return None
    # A peak that is only estimated (probed on a busy machine, say) is too low, and would put the floor too high.
    pairs = ((floor.arithmetic_floor, floor.best_peak_flops), (floor.bandwidth_floor, floor.bandwidth))
    floors = [value for item, peak in pairs if peak.basis == "measured" and (value := known(item)) is not None]
    if not floors or not LEAST * step <= max(floors) <= MOST * step:
        return None
    least = max(floors)
    share = min(1.0, least / step)
    return Finding(
        rule=CARD.name,
        title="Nothing much to gain here",
        evidence=f"A step takes {units.seconds(step)}; the least this machine allows is {units.seconds(least)} "
        f"({floor.best_dtype}), {units.percent(share)} of it.",
        share=Quantity(value=share, unit="fraction", n=m.anatomy.step.n, basis="estimated"),
        helps="keep your baseline; only other hardware or less arithmetic (a recipe) would be faster",
        gain=estimated(1.0, "ratio", 1.0, max(1.0, step / least)),
        rests_on="the step against the roofline of this machine",
        severity="note",
    )
