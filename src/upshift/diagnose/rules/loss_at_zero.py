"""The training loss has gone to zero: memorised, or the answer leaks into the input."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import cost, is_zero, one_loss, spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="loss_at_zero",
    summary="The training loss is practically zero: memorised, or the target leaks into the input.",
    source="Zhang et al. 2017, Understanding deep learning requires rethinking generalization",
    triggers="the last quarter of the steps watched lies below a ten-thousandth of the first losses",
    limits="A task that can be solved exactly (a noise-free function) may end there rightly.",
)
VALUES = 20


def rule(m: Measurement) -> Finding | None:
    """Speaks where one loss, never negative, ends at zero."""
    recipe = one_loss(m)
    if recipe is None or len(recipe.curve) < VALUES or not is_zero(recipe):
        return None
    steps = len(recipe.curve) * recipe.stride
    return spoken(
        CARD,
        m,
        title="The training loss is at zero",
        evidence=f"After {steps:,} steps the loss is {recipe.curve[-1]:.2g}; it began at {max(recipe.curve[:5]):.3g}. "
        f"Further steps teach next to nothing. {cost(m, steps)}",
        helps="stop here; if data it has not seen are not predicted as well, it has memorised: more data, augmentation "
        "or a smaller model; if they are, look for the target among the inputs",
    )
