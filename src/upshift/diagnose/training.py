"""Shared by the rules on how a training is set up: when they may speak, and what the planned steps cost in time."""

from __future__ import annotations

from typing import Literal

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import known
from upshift.records import Finding, Measurement, unknown
from upshift.records.recipe import LeftOut, RecipeFacts

#: Seconds of planned training from which a habit that wastes it is more than a note.
LONG = 3600.0


def own_loop(m: Measurement) -> RecipeFacts | None:
    """What was seen of the recipe, where the script's own, readable source holds the whole training; else None."""
    recipe = m.facts.recipe
    if recipe is None or recipe.declared is None or m.facts.frameworks:
        return None
    return recipe


def one_loss(m: Measurement) -> RecipeFacts | None:
    """As `own_loop`, where one loss has to fall: one optimizer, and no rewards (theirs need not fall)."""
    recipe = own_loop(m)
    if recipe is None or not m.facts.loss_seen or len(m.facts.optimizers) != 1 or "reward" in (recipe.declared or ()):
        return None
    return recipe


def warms_up(recipe: RecipeFacts) -> bool:
    """Whether the learning rate rose over the steps watched, or could not be read."""
    first, last = recipe.rate_first, recipe.rate_last
    return first is None or last is None or last > 1.2 * first


def is_zero(recipe: RecipeFacts) -> bool:
    """Whether a loss that was never negative ended below a ten-thousandth of where it began."""
    curve = recipe.curve
    if not curve or min(curve) < 0:
        return False
    later = sorted(curve[-max(len(curve) // 4, 1) :])
    return later[len(later) // 2] <= 1e-4 * max(curve[:5])


def planned(m: Measurement, after: int = 0) -> float | None:
    """Seconds the planned steps after the first `after` take at the step time seen; None where it is not known."""
    step, total = known(m.anatomy.step), m.facts.steps_total
    return None if not step or not total else max(total - after, 0) * step


def cost(m: Measurement, after: int = 0) -> str:
    """A sentence on what the planned steps take."""
    seconds = planned(m, after)
    if seconds is None:
        return "How many hours that costs is unknown."
    which = "still planned" if after else "planned"
    return f"The {max((m.facts.steps_total or 0) - after, 0):,} steps {which} take {units.seconds(seconds)}."


def weight(m: Measurement) -> Literal["minor", "note"]:
    """`minor` where the training is planned to take an hour or longer, else `note`."""
    return "minor" if (planned(m) or 0.0) >= LONG else "note"


def named(left: LeftOut) -> str:
    """`fc.weight, fc.bias and 3 more`."""
    more = left.tensors - len(left.names)
    listed = ", ".join(left.names) or "parameters without a name"
    return f"{listed} and {more} more" if more > 0 and left.names else listed


def spoken(
    card: FindingCard,
    m: Measurement,
    *,
    title: str,
    evidence: str,
    helps: str,
    severity: Literal["major", "minor", "note"] = "minor",
) -> Finding:
    """A finding without a share of the step and without a predicted speed-up: it is about what the steps are for."""
    return Finding(
        rule=card.name,
        title=title,
        evidence=evidence,
        share=unknown("fraction"),
        helps=helps,
        gain=unknown("ratio"),
        rests_on="no speed-up of the step: it is about what the steps are worth",
        edit=m.script,
        severity=severity,
    )
