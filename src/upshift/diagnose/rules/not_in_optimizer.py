"""Gradients are computed for parameters that no optimizer holds."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import cost, named, spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="not_in_optimizer",
    summary="Parameters get gradients, and no optimizer holds them: they stay as they were made.",
    source="PyTorch documentation, torch.optim (constructing an optimizer)",
    triggers="a parameter of a model has a gradient, and no torch.optim optimizer in the process holds it",
    limits="Parameters updated by hand look the same.",
)


def rule(m: Measurement) -> Finding | None:
    """Speaks on the parameters of the models that were called."""
    recipe = m.facts.recipe
    if recipe is None or not recipe.not_optimized.tensors:
        return None
    left = recipe.not_optimized
    return spoken(
        CARD,
        m,
        title="Parameters are in no optimizer",
        evidence=f"{named(left)} ({units.percent(left.share)} of the trainable elements) get gradients, and no "
        f"optimizer holds them. {cost(m)}",
        helps="give them to the optimizer; if they are to stay as they are: requires_grad_(False), which also saves "
        "their part of the backward pass",
        severity="minor" if left.share >= 0.01 else "note",
    )
