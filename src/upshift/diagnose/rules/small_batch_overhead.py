"""The step is mostly overhead: so little arithmetic per step that a larger batch would cost hardly more."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import known, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="small_batch_overhead",
    summary="The batch is so small that a step is mostly overhead of the host.",
    source="Williams et al. 2009, Roofline; McCandlish et al. 2018, An Empirical Model of Large-Batch Training",
    triggers="the roofline floor is under 5 % of a step shorter than 0.1 s that is mostly model and optimizer",
    limits="A larger batch is another training: learning rate and accuracy must be looked at again.",
)
LEAST, FRACTION, SHORT = 0.5, 0.05, 0.1


def rule(m: Measurement) -> Finding | None:
    """Speaks on the floor in the dtype in use against the step."""
    step, share, floor = known(m.anatomy.step), share_of(m, "forward", "backward", "optimizer"), m.floor
    if floor is None or not step or step > SHORT or share.value is None or share.value < LEAST:
        return None
    flops, peak, memory = known(floor.flops), known(floor.peak_flops), known(floor.bandwidth_floor)
    if flops is None or not peak or memory is None:
        return None
    fraction = max(flops / peak, memory) / step
    if fraction >= FRACTION:
        return None
    return Finding(
        rule=CARD.name,
        title="Mostly overhead: the batch is small",
        evidence=f"A step takes {units.seconds(step)}; its arithmetic and memory traffic would take "
        f"{units.seconds(fraction * step)}, {units.percent(fraction)} of it.",
        share=share,
        helps="a larger batch, as a recipe: it changes training, so the result must be judged on your own metric",
        gain=estimated(1.3, "ratio", 1.0, 2.0 / (1.0 + fraction)),
        rests_on="samples per second with twice the batch, if overhead does not grow; the step itself gets no shorter",
        edit=m.script,
        severity="minor",
    )
