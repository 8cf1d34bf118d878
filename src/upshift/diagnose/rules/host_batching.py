"""The script makes its batches itself, in the training thread, without a DataLoader."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, percent, quote, severity, total_share
from upshift.diagnose.lines import item_by_item, outside
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="host_batching",
    summary="Batches are made inside the training loop, without a DataLoader.",
    source="Mohan et al. 2021, Analyzing and Mitigating Data Stalls in DNN Training",
    triggers="no training DataLoader, and 5 % of the time or more in lines that look like making a batch",
    limits="Lines are recognised by their function's name and their text; others are not seen.",
)
LEAST = 0.05


def rule(m: Measurement) -> Finding | None:
    """Speaks on host lines where no training DataLoader was seen; bounded by the step's `other` time."""
    if any(item.training for item in m.facts.loaders):
        return None
    lines = [item for item, kind in outside(m) if kind == "batch"]
    share = total_share(lines)
    if share.value is None or share.value < LEAST:
        return None
    looped = item_by_item(lines[0])
    predicted = gain(share, 10.0 if looped else 2.0, low=2.0 if looped else 1.0)
    return Finding(
        rule=CARD.name,
        title="Batches are made in the training loop",
        evidence=f"{percent(share)} of the time is spent making batches, most of it in {quote(lines[0])}.",
        share=share,
        helps="make the next batch in a thread or in DataLoader workers while this one trains, or index whole "
        "tensors at once instead of looping over samples",
        gain=predicted,
        rests_on="the share of these lines, "
        + ("a tenth of it without a loop over samples" if looped else "halved")
        + "; at most gone",
        edit=f"{lines[0].file}:{lines[0].line}",
        severity=severity(share, predicted),
    )
