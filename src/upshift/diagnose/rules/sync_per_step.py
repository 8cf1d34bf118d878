"""The host waits for the device in the middle of a step."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, known, on_cpu, percent, quote, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="sync_per_step",
    summary="A line makes the host wait for the device in every step.",
    source="PyTorch performance tuning guide, Avoid unnecessary CPU-GPU synchronization",
    triggers="on an accelerator: the sync phase is 2 % of the step or more, with the lines that wait",
    limits="One wait a step may be needed; what remains is that the device runs dry after it.",
)
LEAST = 0.02


def rule(m: Measurement) -> Finding | None:
    """Speaks on recorded synchronisations with file and line."""
    lines = sorted((item for item in m.syncs if known(item.share)), key=lambda item: -item.share.or_else(0.0))
    if on_cpu(m) or not lines:
        return None
    share = share_of(m, "sync")
    if share.value is None:
        share = lines[0].share
    if share.or_else(0.0) < LEAST:
        return None
    predicted = gain(share, 1.5)
    named = "; ".join(f"{quote(item)} {percent(item.share)}" for item in lines[:3])
    return Finding(
        rule=CARD.name,
        title="The host waits for the device each step",
        evidence=f"{percent(share)} of each step is spent in device syncs: {named}.",
        share=share,
        helps="keep such values on the device and read them every few steps",
        gain=predicted,
        rests_on="a third of the waiting gone; at most all of it",
        edit=f"{lines[0].file}:{lines[0].line}",
        severity=severity(share, predicted),
    )
