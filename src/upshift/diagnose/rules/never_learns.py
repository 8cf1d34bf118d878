"""Parameters in the optimizer that never learn."""

from __future__ import annotations

from typing import Literal

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import cost, named, spoken
from upshift.records import Finding, Measurement
from upshift.records.recipe import LeftOut

CARD = FindingCard(
    name="never_learns",
    summary="The optimizer holds parameters whose gradient is always missing or zero: frozen by accident.",
    source="PyTorch documentation, Autograd mechanics (locally disabling gradient computation)",
    triggers="16 optimizer steps or more in which no gradient but None or zeros was seen for a trainable parameter",
    limits="Zeros are looked for at the first 8 steps and at powers of two. Parts used only now and then may be meant.",
)
STEPS = 16


def rule(m: Measurement) -> Finding | None:
    """Speaks on trainable parameters that an optimizer holds."""
    recipe = m.facts.recipe
    if recipe is None or recipe.gradient_steps < STEPS:
        return None
    without, zero = recipe.no_gradient, recipe.zero_gradient
    if not without.tensors and not zero.tensors:
        return None
    share = without.share + zero.share
    seen = " ".join(
        text for text in (_seen(without, "never had a gradient"), _seen(zero, "had only zeros as gradient")) if text
    )
    return spoken(
        CARD,
        m,
        title="Parameters never learn",
        evidence=f"In {recipe.gradient_steps:,} optimizer steps: {seen} That is {units.percent(share)} of what the "
        f"optimizer is to train. {cost(m)}",
        helps="look for .detach(), .data, no_grad or .item() between them and the loss, and for layers forward() does "
        "not use; if they are to stay as they are: requires_grad_(False), and out of the optimizer",
        severity=_severity(share),
    )


def _seen(left: LeftOut, what: str) -> str:
    return f"{named(left)} {what}." if left.tensors else ""


def _severity(share: float) -> Literal["major", "minor", "note"]:
    if share >= 0.5:
        return "major"
    return "minor" if share >= 0.01 else "note"
