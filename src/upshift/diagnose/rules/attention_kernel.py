"""Scaled dot-product attention runs on whatever kernel PyTorch's rules picked."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, percent, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="attention_kernel",
    summary="Another attention kernel may be faster for these shapes.",
    source="Dao et al. 2022, FlashAttention; torch.nn.attention.sdpa_kernel documentation",
    triggers="scaled_dot_product_attention is called, and forward + backward are 30 % of the step or more",
    limits="How much of forward and backward is attention is not measured.",
    techniques=("attention",),
)
LEAST = 0.3


def rule(m: Measurement) -> Finding | None:
    """Speaks where calls of scaled_dot_product_attention were seen."""
    share = share_of(m, "forward", "backward")
    if not m.facts.attention or share.value is None or share.value < LEAST:
        return None
    predicted = gain(share, 1.03, high=1.3)
    return Finding(
        rule=CARD.name,
        title="The attention kernel is the default choice",
        evidence=f"scaled_dot_product_attention is called; forward and backward are {percent(share)} of the step.",
        share=share,
        helps="trying the other attention kernels on this model's own shapes",
        gain=predicted,
        rests_on="attention taken as a small part of forward and backward; its own time is not measured",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
