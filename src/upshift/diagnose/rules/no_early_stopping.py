"""The loss has levelled off, many steps are planned, and nothing would end them."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.curve import drop, still_to_fall
from upshift.diagnose.training import cost, is_zero, one_loss, spoken, warms_up
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="no_early_stopping",
    summary="The loss has levelled off long before the planned end, and nothing stops the training.",
    source="Prechelt 1998, Early Stopping - But When?; loss against the logarithm of the step",
    triggers="the trend of the later half promises (at 99 %) at most 2 % of the fall so far, over all steps planned, "
    "which are four times those watched or more",
    limits="Holds for the learning rate as it is: silent where a schedule is seen or spoken of, and where the source "
    "speaks of stopping early. Needs the number of planned steps.",
)
SMALL = 0.02
#: Planned steps for every step watched.
AHEAD = 4


def rule(m: Measurement) -> Finding | None:
    """Speaks on the loss curve and the number of planned steps."""
    recipe, total = one_loss(m), m.facts.steps_total
    if recipe is None or not total or recipe.rate_changes or recipe.schedulers or warms_up(recipe):
        return None
    if {"schedule", "stopping"} & set(recipe.declared or ()) or is_zero(recipe):
        return None
    steps = len(recipe.curve) * recipe.stride
    fell, more = drop(recipe.curve), still_to_fall(recipe.curve, recipe.stride, total)
    if fell is None or more is None or total < AHEAD * steps or more > SMALL * fell:
        return None
    return spoken(
        CARD,
        m,
        title="The loss has levelled off, and the training goes on",
        evidence=f"The loss fell by {fell:.3g} in {steps:,} steps, to {recipe.curve[-1]:.4g}; its trend promises "
        f"{more:.2g} more at most (99 %) until step {total:,}. {cost(m, steps)}",
        helps="stop when the validation loss has not fallen for some epochs, or lower the learning rate there",
    )
