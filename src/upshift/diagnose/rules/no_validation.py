"""Nothing tells whether the model works on data it was not trained on."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import cost, one_loss, spoken, weight
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="no_validation",
    summary="No evaluation on other data was seen, and the source speaks of none.",
    source="Prechelt 1998, Early Stopping - But When?",
    triggers="20 steps or more without work without gradients, and no name in the source speaks of evaluation",
    limits="Evaluation in another program is not seen. A note where less than an hour of training is planned.",
)
STEPS = 20


def rule(m: Measurement) -> Finding | None:
    """Speaks where neither the run nor the source evaluates."""
    recipe = one_loss(m)
    if recipe is None or recipe.evaluations or "validation" in (recipe.declared or ()):
        return None
    if m.anatomy.steps_seen < STEPS or m.anatomy.evaluation.or_else(0.0) > 0:
        return None
    return spoken(
        CARD,
        m,
        title="Nothing is validated",
        evidence=f"In {m.anatomy.steps_seen:,} steps nothing ran without gradients, and nothing in the source is named "
        f"like an evaluation: the training loss cannot tell learning from memorising. {cost(m)}",
        helps="hold a part of the data back (torch.utils.data.random_split) and look at its loss once an epoch",
        severity=weight(m),
    )
