"""The evaluation loss rises while the training loss goes on falling."""

from __future__ import annotations

import itertools

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import cost, spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="overfitting",
    summary="The evaluation loss has been rising for some passes while the training loss fell on.",
    source="Prechelt 1998, Early Stopping - But When? (generalisation loss)",
    triggers="three passes or more after the best one, each higher than the one before, 3 % above it at the end, while "
    "the training loss fell by 3 % or more",
    limits="Needs evaluations in the seconds watched, by a loss function of torch and over as many samples each time; "
    "otherwise it is unknown. A metric of your own may still improve.",
)
PASSES = 3
RISE = 0.03


def rule(m: Measurement) -> Finding | None:
    """Speaks on passes of evaluation and the training between them."""
    scores = m.facts.recipe.scores if m.facts.recipe is not None else ()
    if not scores:
        return None
    at = min(range(len(scores)), key=lambda i: scores[i].evaluation)
    best, later = scores[at], scores[at:]
    if len(later) <= PASSES or best.evaluation <= 0 or best.training <= 0:
        return None
    if any(b.evaluation <= a.evaluation for a, b in itertools.pairwise(later)):
        return None
    last = scores[-1]
    if last.evaluation < (1 + RISE) * best.evaluation or last.training > (1 - RISE) * best.training:
        return None
    return spoken(
        CARD,
        m,
        title="It overfits",
        evidence=f"The evaluation loss was lowest after {best.step:,} steps ({best.evaluation:.4g}) and rose in every "
        f"pass since, to {last.evaluation:.4g} after {last.step:,}; the training loss fell from {best.training:.4g} to "
        f"{last.training:.4g}. {cost(m, best.step)}",
        helps="keep the weights of the best evaluation and stop some passes after it; more data, augmentation, dropout "
        "or weight decay to go further",
    )
