"""One line of the training loop, none of the model's, takes a visible part of the time."""

from __future__ import annotations

import msgspec

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, lines_of, percent, quote, severity, share_of, total_share
from upshift.diagnose.lines import Purpose, outside, purpose
from upshift.records import Finding, LineCost, Measurement

CARD = FindingCard(
    name="slow_loop_line",
    summary="A line of the training loop outside model, loss and optimizer is slow.",
    source="sampling of the training thread (Graham, Kessler and McKusick 1982, gprof)",
    triggers="a host line, or a function that the training loop calls, takes 5 % of the time or more, at 95 % "
    "confidence over 2 %, outside the phases of the step",
    limits="What the line does is not known: it may be needed. Waiting is recognised by its text.",
)
LEAST, SURE = 0.05, 0.02


def _gathered(m: Measurement) -> list[tuple[LineCost, Purpose, int]]:
    """What `outside` finds, slowest first, with the number of lines: those of a function the loop calls are one.

    A loop over tensors spreads over several lines none of which stands out.
    """
    loops = {(item.file, item.function) for item in lines_of(m, "host") if purpose(item) == "compute"}
    groups: dict[tuple[str, ...], list[tuple[LineCost, Purpose]]] = {}
    for item, kind in outside(m):
        own = (item.file, item.function) in loops or item.function == "<module>" or kind in ("log", "wait")
        groups.setdefault((item.file, item.function, kind, *([str(item.line)] if own else [])), []).append((item, kind))
    found = []
    for members in groups.values():
        first, kind = members[0]
        share = total_share([item for item, _ in members])
        found.append((msgspec.structs.replace(first, share=share), kind, len(members)))
    return sorted(found, key=lambda item: -item[0].share.or_else(0.0))


def rule(m: Measurement) -> Finding | None:
    """Speaks on the slowest such line that is neither logging nor makes batches where no loader does."""
    if share_of(m, "other").or_else(0.0) < LEAST:
        return None
    batches_count = any(item.training for item in m.facts.loaders)
    for line, kind, count in _gathered(m):
        share = line.share
        if share.or_else(0.0) < LEAST or (share.low if share.low is not None else 0.0) < SURE:
            return None
        if kind == "log" or (kind == "batch" and not batches_count):
            continue
        waiting = kind == "wait"
        predicted = gain(share, 10.0 if waiting else 2.0, low=2.0 if waiting else 1.0)
        where = (
            f"{count} lines of `{line.function}`, most of it in {quote(line)}"
            if count > 1
            else (f"{quote(line)}, in `{line.function}`")
        )
        return Finding(
            rule=CARD.name,
            title="The training loop waits" if waiting else "A slow line in the training loop",
            evidence=f"{percent(share)} of the time is spent in {where}.",
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
