"""Products run in float32 although this machine was measured to do them faster in bfloat16."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="fp32_where_bf16_is_faster",
    summary="The products run in float32, where bfloat16 is measurably faster.",
    source="Micikevicius et al. 2018, Mixed Precision Training; Kalamkar et al. 2019, A Study of BFLOAT16",
    triggers="the probed bfloat16 peak is 1.3 times the peak of the dtype in use or more, and no autocast is on",
    limits="A peak is of large products: small layers, recurrent ones above all, may become slower.",
    techniques=("bf16",),
)
LEAST_RATIO = 1.3


def rule(m: Measurement) -> Finding | None:
    """Speaks on probed peaks; the gain lies between the arithmetic alone and all of forward and backward."""
    floor = m.floor
    if floor is None or m.facts.autocast or floor.dtype not in ("float32", "tf32") or floor.best_dtype != "bfloat16":
        return None
    present, best = known(floor.peak_flops), known(floor.best_peak_flops)
    share = share_of(m, "forward", "backward")
    if not present or not best or share.value is None or best < LEAST_RATIO * present:
        return None
    factor = best / present
    products = min(share.value, known(floor.mfu) or 0.0)
    low = amdahl(products, factor) if products else 1.0
    high = amdahl(share.value, factor)
    predicted = estimated((low * high) ** 0.5, "ratio", low, high)
    return Finding(
        rule=CARD.name,
        title="bfloat16 is faster here",
        evidence=f"The products run in {floor.dtype} at a peak of {units.si(present, 'FLOP/s')}; in bfloat16 this "
        f"machine was measured at {units.si(best, 'FLOP/s')}, {units.ratio(factor)}. Forward and backward are "
        f"{units.percent(share.value)} of the step.",
        share=share,
        helps="autocast to bfloat16 around the model's forward pass",
        gain=predicted,
        rests_on="Amdahl's law: between the counted FLOPs alone and all of forward and backward",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
