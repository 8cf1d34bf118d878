"""The step is mostly overhead: so little arithmetic per step that a larger batch would cost hardly more."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import SMALL_KERNELS, TINY, known, least_seconds, samples_fed, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="small_batch_overhead",
    summary="The batch is so small that a step is mostly overhead of the host.",
    source="Williams et al. 2009, Roofline; McCandlish et al. 2018, An Empirical Model of Large-Batch Training",
    triggers="the roofline floor is under 5 % of a step shorter than 0.1 s that is mostly model and optimizer, and "
    "the model is fed 16 samples at a time or fewer",
    limits="A larger batch is another training: learning rate and accuracy must be looked at again.",
)
LEAST, FRACTION, SHORT = 0.5, 0.05, 0.1


def rule(m: Measurement) -> Finding | None:
    """Speaks on the floor in the dtype in use against the step."""
    step, share = known(m.anatomy.step), share_of(m, "forward", "backward", "optimizer")
    least = least_seconds(m.floor)
    if least is None or not step or step > SHORT or share.value is None or share.value < LEAST:
        return None
    fraction = least / step
    if fraction >= FRACTION or (samples_fed(m) or 0) > TINY:
        return None
    # What grows with the batch: the work itself, and fetching more samples.
    grows = SMALL_KERNELS * fraction + (known(share_of(m, "data")) or 0.0)
    return Finding(
        rule=CARD.name,
        title="Mostly overhead: the batch is small",
        evidence=f"A step takes {units.seconds(step)}; its arithmetic and memory traffic would take "
        f"{units.seconds(fraction * step)}, {units.percent(fraction)} of it.",
        share=share,
        helps="a larger batch, as a recipe: it changes training, so the result must be judged on your own metric",
        gain=estimated(max(1.0, 2.0 / (1.0 + grows)), "ratio", 1.0, 2.0),
        rests_on="samples per second with twice the batch, where only the work grows; the step itself gets no shorter",
        edit=m.script,
        severity="minor",
    )
