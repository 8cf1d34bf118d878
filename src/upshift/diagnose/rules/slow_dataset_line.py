"""One line of the user's dataset takes a large part of the step."""

from __future__ import annotations

import re

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import fitted, gain, lines_of, percent, quote, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="slow_dataset_line",
    summary="One line of the dataset's own code is slow.",
    source="sampling of the training thread (Graham, Kessler and McKusick 1982, gprof)",
    triggers="a line called from the DataLoader takes 5 % of the time or more, at 95 % confidence over 2 %",
    limits="Only seen where the dataset runs in the training process (no workers).",
    techniques=("cache",),
)
LEAST, SURE = 0.05, 0.02

#: The loop that asks for batches is where a dataset of a library shows up; no edit there helps.
_LOOP = re.compile(r"^(async )?for .+ in .+:|\bnext\(")


def rule(m: Measurement) -> Finding | None:
    """Speaks on the slowest line of kind `data`."""
    phase = share_of(m, "data")
    for line in fitted(lines_of(m, "data"), phase, phase):
        if _LOOP.search(line.text):
            continue
        share = line.share
        if share.or_else(0.0) < LEAST or (share.low if share.low is not None else 0.0) < SURE:
            return None
        predicted = gain(share, 2.0)
        return Finding(
            rule=CARD.name,
            title="A slow line in the dataset",
            evidence=f"{percent(share)} of the time is spent in {quote(line)}, in `{line.function}`.",
            share=share,
            helps="do this work once and keep the result, or for a whole batch at a time",
            gain=predicted,
            rests_on="this line made twice as fast; at most gone",
            techniques=CARD.techniques,
            edit=f"{line.file}:{line.line}",
            severity=severity(share, predicted),
        )
    return None
