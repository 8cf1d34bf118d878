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
    triggers="lines of the forward pass or the loss that index single elements take, with their part of the backward "
    "pass, 10 % of the time or more and a quarter of forward and loss, and the arithmetic of forward and backward "
    "needs under a fifth of theirs",
    limits="Loops are recognised by the text of their lines. A loop whose rounds need each other may not be removable.",
    techniques=("compile",),
)
LEAST, FRACTION, PART = 0.1, 0.2, 0.25


def _looped(line: LineCost) -> bool:
    return item_by_item(line) and (line.function == "forward" or purpose(line) == "")


def _inside(m: Measurement, inside: float) -> list[LineCost]:
    """Host lines that look like a loop's, where forward and loss have room for them.

    What stands in the training loop is of the loss only as far as the time of forward and loss is not that of others:
    a loop behind the step looks alike.
    """
    host = lines_of(m, "host")
    looped = [item for item in host if _looped(item)]
    own = [item for item in looped if item.function == "forward"]
    free = [item for item in looped if item.function != "forward"]
    calls = [item for item in host if purpose(item) == "compute" and not _ends(item) and item not in own]
    room = inside - total_share(own).or_else(0.0) - total_share(calls).or_else(0.0)
    return looped if total_share(free).or_else(0.0) <= 2.0 * room else own


def _ends(line: LineCost) -> bool:
    """Whether a line belongs to backward and optimizer."""
    return any(word in line.text for word in (".backward(", ".step(", ".zero_grad("))


def rule(m: Measurement) -> Finding | None:
    """Speaks on host lines within forward and loss, with their part of the backward pass."""
    step, least = known(m.anatomy.step), least_seconds(m.floor)
    inside, whole = share_of(m, "forward", "loss"), share_of(m, "forward", "loss", "backward")
    if not step or least is None or not inside.value or not whole.value:
        return None
    lines = _inside(m, inside.value)
    spent = total_share(lines)
    if spent.value is None or least > FRACTION * whole.value * step:
        return None
    # The backward pass goes through the same operations as the loop did.
    part = min(1.0, spent.value / inside.value)
    share = Quantity(value=part * whole.value, unit="fraction", n=spent.n, basis="estimated")
    if part < PART or share.or_else(0.0) < LEAST:
        return None
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
