"""A Python loop inside the model or the loss handles one element after the other."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import (
    gain,
    known,
    least_seconds,
    lines_of,
    percent,
    quote,
    severity,
    share_of,
    total_share,
)
from upshift.diagnose.lines import item_by_item, purpose
from upshift.records import Finding, LineCost, Measurement, Quantity

CARD = FindingCard(
    name="python_loop",
    summary="A Python loop in the model or the loss handles one element at a time.",
    source="PyTorch performance tuning guide; Ansel et al. 2024, PyTorch 2",
    triggers="lines of the forward pass or the loss that index single elements take 10 % of the time or more, and "
    "the arithmetic of forward and backward needs under a fifth of theirs",
    limits="Loops are recognised by the text of their lines. A loop whose rounds need each other may not be removable.",
    techniques=("compile",),
)
LEAST, FRACTION = 0.1, 0.2


def _looped(line: LineCost) -> bool:
    return item_by_item(line) and (line.function == "forward" or purpose(line) == "")


def rule(m: Measurement) -> Finding | None:
    """Speaks on host lines within forward and loss, with their part of the backward pass."""
    step, least = known(m.anatomy.step), least_seconds(m.floor)
    inside, whole = share_of(m, "forward", "loss"), share_of(m, "forward", "loss", "backward")
    if not step or least is None or not inside.value or not whole.value:
        return None
    lines = [item for item in lines_of(m, "host") if _looped(item)]
    spent = total_share(lines)
    if spent.value is None or min(spent.value, inside.value) < LEAST or least > FRACTION * whole.value * step:
        return None
    # The backward pass goes through the same operations as the loop did.
    part = min(1.0, spent.value / inside.value)
    share = Quantity(value=part * whole.value, unit="fraction", n=spent.n, basis="estimated")
    predicted = gain(share, 10.0)
    return Finding(
        rule=CARD.name,
        title="A Python loop in the model or the loss",
        evidence=f"{percent(spent)} of the time is spent in lines that handle one element at a time, most of it in "
        f"{quote(lines[0])}, in `{lines[0].function}`; with their backward pass {units.percent(part * whole.value)}.",
        share=share,
        helps="one operation on the whole tensor instead of a loop, or compiling the model, which unrolls it",
        gain=predicted,
        rests_on="a tenth of the loop and its backward pass left; at most none",
        techniques=CARD.techniques,
        edit=f"{lines[0].file}:{lines[0].line}",
        severity=severity(share, predicted),
    )
