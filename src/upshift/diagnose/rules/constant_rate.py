"""A long training at one learning rate."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import LONG, one_loss, planned, spoken
from upshift.records import Finding, Measurement
from upshift.records.recipe import sets_own_steps

CARD = FindingCard(
    name="constant_rate",
    summary="A long training keeps one learning rate from the first step to the last.",
    source="Defazio et al. 2023, When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement",
    triggers="20,000 steps and an hour or more planned; one rate over the steps watched, and no schedule in the source",
    limits="A rate that would only change after the steps watched, by code that never names it, is not seen. What a "
    "schedule saves depends on the task and is unknown.",
)
STEPS = 20_000


def rule(m: Measurement) -> Finding | None:
    """Speaks where neither the run nor the source changes the rate."""
    recipe, seconds = one_loss(m), planned(m)
    if recipe is None or recipe.rate_changes != 0 or recipe.schedulers or "schedule" in (recipe.declared or ()):
        return None
    if seconds is None or seconds < LONG or (m.facts.steps_total or 0) < STEPS or recipe.rate_first is None:
        return None
    if any(sets_own_steps(item.name) for item in m.facts.optimizers):
        return None
    return spoken(
        CARD,
        m,
        title="The learning rate never changes",
        evidence=f"It was {recipe.rate_first:g} at every step watched, no scheduler was made, and the source names "
        f"none; {m.facts.steps_total:,} steps are planned ({units.seconds(seconds)}). The same loss is usually reached "
        "in fewer steps with a rate that falls to zero; how many hours that saves here is unknown.",
        helps="torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS) and scheduler.step() after "
        "each optimizer step",
    )
