"""The loss does not fall, or is not finite: the training may be useless."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.curve import Fall, fall
from upshift.diagnose.training import cost, is_zero, one_loss, spoken, warms_up
from upshift.records import Finding, Measurement
from upshift.records.recipe import RecipeFacts

CARD = FindingCard(
    name="loss_not_falling",
    summary="Over the steps watched the loss stayed flat, rose, or was not finite.",
    source="Student's t on the first against the last fifth of the steps, neighbours' correlation allowed for",
    triggers="100 steps or more, one optimizer: the fall is below 2 % of the loss at 99 %, or surely a rise; or NaN",
    limits="Silent while the learning rate rises, for rewards, and (flat) after weights were loaded. A task with a "
    "long plateau, or a loss whose terms are phased in, looks the same.",
)
STEPS = 100
#: From so many steps on a flat loss is more than an early plateau.
SURE = 300
SMALL = 0.02

HELPS = "check that labels match inputs, the sign and the target of the loss, and a learning rate 10 times %s"


def rule(m: Measurement) -> Finding | None:
    """Speaks on the loss curve alone."""
    recipe = m.facts.recipe
    if recipe is None:
        return None
    if recipe.first_not_finite is not None and not m.facts.grad_scaler:
        return spoken(
            CARD,
            m,
            title="The loss is not finite",
            evidence=f"At step {recipe.first_not_finite + 1} the loss is NaN or infinite. {cost(m)}",
            helps="a lower learning rate or clipped gradients; torch.autograd.set_detect_anomaly(True) names the line",
            severity="major",
        )
    recipe = one_loss(m)
    steps = 0 if recipe is None else len(recipe.curve) * recipe.stride
    if recipe is None or steps < STEPS or warms_up(recipe) or is_zero(recipe):
        return None
    seen = fall(recipe.curve)
    return None if seen is None else _judge(m, recipe, seen, steps)


def _judge(m: Measurement, recipe: RecipeFacts, seen: Fall, steps: int) -> Finding | None:
    level = abs(seen.first)
    change = f"from {seen.first:.4g} to {seen.last:.4g} over {steps:,} steps"
    if seen.high < -SMALL * level:
        return spoken(
            CARD,
            m,
            title="The loss rises",
            evidence=f"The loss rose {change}, by {-seen.high:.2g} at least (99 %). {cost(m)}",
            helps=HELPS % "lower",
            severity="major",
        )
    if recipe.loaded or seen.low > 0 or seen.high >= SMALL * level:
        return None
    return spoken(
        CARD,
        m,
        title="The loss does not fall",
        evidence=f"The loss went {change}: a fall of {seen.high:.2g} at most (99 %), which is noise. {cost(m)}",
        helps=HELPS % "higher and lower",
        severity="major" if steps >= SURE else "minor",
    )
