"""One line of the training loop, none of the model's, takes a visible part of the time."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, percent, quote, severity, share_of
from upshift.diagnose.lines import outside
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="slow_loop_line",
    summary="A line of the training loop outside model, loss and optimizer is slow.",
    source="sampling of the training thread (Graham, Kessler and McKusick 1982, gprof)",
    triggers="a host line takes 5 % of the time or more, at 95 % confidence over 2 %, outside the phases of the step",
    limits="What the line does is not known: it may be needed. Waiting is recognised by its text.",
)
LEAST, SURE = 0.05, 0.02


def rule(m: Measurement) -> Finding | None:
    """Speaks on the slowest such line that is neither logging nor makes batches where no loader does."""
    if share_of(m, "other").or_else(0.0) < LEAST:
        return None
    batches_count = any(item.training for item in m.facts.loaders)
    for line, kind in outside(m):
        share = line.share
        if share.or_else(0.0) < LEAST or (share.low if share.low is not None else 0.0) < SURE:
            return None
        if kind == "log" or (kind == "batch" and not batches_count):
            continue
        waiting = kind == "wait"
        predicted = gain(share, 10.0 if waiting else 2.0, low=2.0 if waiting else 1.0)
        return Finding(
            rule=CARD.name,
            title="The training loop waits" if waiting else "A slow line in the training loop",
            evidence=f"{percent(share)} of the time is spent in {quote(line)}, in `{line.function}`.",
            share=share,
            helps="let another thread do the waiting, or wait less often"
            if waiting
            else "do this less often, once for all steps, or for all tensors at a time",
            gain=predicted,
            rests_on="a tenth of the waiting left; at most none"
            if waiting
            else "this line made twice as fast; at most gone",
            edit=f"{line.file}:{line.line}",
            severity=severity(share, predicted),
        )
    return None
