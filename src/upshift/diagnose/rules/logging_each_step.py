"""Reading values, printing or logging in every step costs host time."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, percent, quote, severity, total_share
from upshift.diagnose.lines import outside
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="logging_each_step",
    summary="Printing, logging or reading values takes a visible part of the time.",
    source="PyTorch performance tuning guide, Avoid unnecessary CPU-GPU synchronization",
    triggers="lines that print, log or read values take over 3 % of the time, at 95 % confidence over 1 %",
    limits="Lines are recognised by their text; on an accelerator, lines that read values wait and belong to syncs.",
)
LEAST, SURE = 0.03, 0.01


def rule(m: Measurement) -> Finding | None:
    """Speaks on host lines, by their text."""
    lines = [item for item, kind in outside(m) if kind == "log"]
    share = total_share(lines)
    if share.value is None or share.value <= LEAST or (share.low if share.low is not None else 0.0) < SURE:
        return None
    predicted = gain(share, 10.0, low=2.0)
    return Finding(
        rule=CARD.name,
        title="Logging costs time in the loop",
        evidence=f"{percent(share)} of the time is spent in {quote(lines[0])}"
        + (f" and {len(lines) - 1} more such lines." if len(lines) > 1 else "."),
        share=share,
        helps="do this every few tens of steps; add values up as tensors in between",
        gain=predicted,
        rests_on="these lines run in every tenth step (at least every second)",
        edit=f"{lines[0].file}:{lines[0].line}",
        severity=severity(share, predicted),
    )
