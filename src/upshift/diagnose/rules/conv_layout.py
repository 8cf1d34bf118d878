"""Convolutions run in the default memory format."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, layer_count, percent, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="conv_layout",
    summary="Convolutions run on tensors that do not lie channels-last.",
    source="PyTorch tutorial, Channels Last Memory Format; oneDNN documentation, memory format propagation",
    triggers="a trained model has 2-D convolutions that are not channels-last; forward + backward are 20 % or more",
    limits="Some shapes are slower; nothing in the measurement tells which, so only a trial does.",
    techniques=("channels_last",),
)
LEAST = 0.2
CONVOLUTIONS = ("Conv2d", "ConvTranspose2d")


def rule(m: Measurement) -> Finding | None:
    """Speaks on the layers of trained models."""
    models = [
        item for item in m.facts.models
        if item.trained and not item.channels_last and any(item.layers.get(name) for name in CONVOLUTIONS)
    ]  # fmt: skip
    share = share_of(m, "forward", "backward")
    if not models or share.value is None or share.value < LEAST:
        return None
    predicted = gain(share, 1.15, high=2.0)
    return Finding(
        rule=CARD.name,
        title="Convolutions are not channels-last",
        evidence=f"{models[0].name} has {layer_count(m, CONVOLUTIONS):,} 2-D convolutions with weights in the default "
        f"format; forward and backward are {percent(share)} of the step.",
        share=share,
        helps="weights and inputs in channels-last format, which the convolution kernels work in",
        gain=predicted,
        rests_on="usual gains of convolutional networks (none to 2 times); not this model's own",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
