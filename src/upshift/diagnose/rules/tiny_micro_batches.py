"""Gradients are accumulated over many micro-batches, each too small to be worth its overhead."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import (
    SMALL_KERNELS,
    TINY,
    amdahl,
    known,
    least_seconds,
    samples_fed,
    severity,
    share_of,
)
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="tiny_micro_batches",
    summary="Accumulation over many micro-batches that are mostly overhead.",
    source="Williams et al. 2009, Roofline; torch.autograd documentation, gradient accumulation",
    triggers="4 backward passes a step or more, of 16 samples or fewer, whose arithmetic and memory traffic need under "
    "a tenth of their time",
    limits="Larger micro-batches need more memory; with BatchNorm they are another training, so then it is silent.",
)
MANY, FRACTION = 4.0, 0.1
#: Micro-batches made this much larger.
LARGER = 4.0


def rule(m: Measurement) -> Finding | None:
    """Speaks on backward passes a step and the floor."""
    step, count = known(m.anatomy.step), known(m.anatomy.micro_batches)
    least, share = least_seconds(m.floor), share_of(m, "forward", "loss", "backward")
    if not step or count is None or count < MANY or least is None or not share.value:
        return None
    if any(name.startswith("BatchNorm") for model in m.facts.models for name in model.layers):
        return None
    if (samples_fed(m) or 0) > TINY:
        return None
    fraction = least / (share.value * step)
    if fraction >= FRACTION:
        return None
    overhead = share.value * (1.0 - SMALL_KERNELS * fraction)
    predicted = estimated(
        amdahl(overhead, LARGER),
        "ratio",
        amdahl(overhead, 1.5),
        max(amdahl(share.value, count), amdahl(overhead, LARGER)),
    )
    return Finding(
        rule=CARD.name,
        title="The micro-batches are tiny",
        evidence=f"A step accumulates {count:.0f} micro-batches in {units.seconds(share.value * step)}; their "
        f"arithmetic and memory traffic need {units.seconds(least)}, {units.percent(fraction)} of it.",
        share=share,
        helps=f"micro-batches {LARGER:.0f} times as large and as many times fewer: the global batch stays the same",
        gain=predicted,
        rests_on=f"overhead for each micro-batch, of which there are {LARGER:.0f} times fewer; at most one micro-batch",
        edit=m.script,
        severity=severity(share, predicted),
    )
