"""The model computes in float64."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, percent, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="double_precision",
    summary="The model computes in float64, at half the speed of float32 or less.",
    source="numpy's default type is float64; Williams et al. 2009, Roofline",
    triggers="the products of the step, or all parameters of a trained model, are float64; forward, backward and "
    "optimizer are 10 % of the step or more",
    limits="float32 is another precision: where float64 is needed (physics, ill-conditioned problems) it is right.",
)
LEAST = 0.1


def rule(m: Measurement) -> Finding | None:
    """Speaks on the type of products and parameters."""
    share = share_of(m, "forward", "backward", "optimizer")
    wide = any(item.trained and item.dtypes == ("float64",) for item in m.facts.models)
    if not (wide or (m.floor is not None and m.floor.dtype == "float64")):
        return None
    if share.value is None or share.value < LEAST:
        return None
    predicted = gain(share, 2.0, low=1.3, high=4.0)
    return Finding(
        rule=CARD.name,
        title="The model computes in float64",
        evidence=f"Products and parameters are float64; forward, backward and optimizer are {percent(share)} of "
        "the step.",
        share=share,
        helps="float32 for model and data (numpy makes float64 by default), if the result allows it",
        gain=predicted,
        rests_on="half the bytes and twice the operations at a time (1.3 to 4)",
        edit=m.script,
        severity=severity(share, predicted),
    )
