"""The script makes its batches itself, in the training thread, without a DataLoader."""

from __future__ import annotations

import re

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, lines_of, percent, quote, severity, share_of, total_share
from upshift.records import Finding, LineCost, Measurement

CARD = FindingCard(
    name="host_batching",
    summary="Batches are made inside the training loop, without a DataLoader.",
    source="Mohan et al. 2021, Analyzing and Mitigating Data Stalls in DNN Training",
    triggers="no training DataLoader, and 5 % of the time or more in lines that look like making a batch",
    limits="Lines are recognised by their function's name and their text; others are not seen.",
)
LEAST = 0.05

_FUNCTION = re.compile(
    r"batch|collate|augment|sample_|fetch|load_|next_|make_data|tokeni[sz]e|preprocess", re.IGNORECASE
)
_TEXT = re.compile(
    r"from_numpy|np\.random|randint\(|randperm\(|torch\.stack|memmap|\.open\(|np\.load|pin_memory|\w*batch\w*\("
)
_COMPUTE = re.compile(r"\.backward\(|\.step\(|\.zero_grad\(|loss\s*=|model\(|criterion\(")


def _makes_batches(line: LineCost) -> bool:
    if line.function == "forward" or _COMPUTE.search(line.text):
        return False
    return bool(_TEXT.search(line.text)) or (line.function != "<module>" and bool(_FUNCTION.search(line.function)))


def rule(m: Measurement) -> Finding | None:
    """Speaks on host lines where no training DataLoader was seen; bounded by the step's `other` time."""
    if any(item.training for item in m.facts.loaders):
        return None
    lines = [item for item in lines_of(m, "host") if _makes_batches(item)]
    share = total_share(lines)
    other = share_of(m, "other")
    if share.value is None or share.value < LEAST or (other.value is not None and other.value < LEAST):
        return None
    predicted = gain(share, 2.0)
    return Finding(
        rule=CARD.name,
        title="Batches are made in the training loop",
        evidence=f"{percent(share)} of the time is spent making batches, most of it in {quote(lines[0])}.",
        share=share,
        helps="make the next batch in a thread or in DataLoader workers while this one trains, or index whole "
        "tensors at once instead of looping over samples",
        gain=predicted,
        rests_on="the share of these lines, halved; at most gone",
        edit=f"{lines[0].file}:{lines[0].line}",
        severity=severity(share, predicted),
    )
