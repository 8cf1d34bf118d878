"""A strong weight decay that also pulls norms and biases to zero."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="decay_on_norms",
    summary="Strong weight decay also acts on normalisation weights and biases.",
    source="Jia et al. 2018 (arXiv:1807.11205); He et al. 2019, Bag of Tricks (no bias decay)",
    triggers="decoupled weight decay of 0.05 or more on parameters of one dimension, in a model with norm layers",
    limits="A note only; what it changes is unknown, and often little.",
)
STRONG = 0.05


def rule(m: Measurement) -> Finding | None:
    """Speaks on the groups of AdamW and its kin."""
    recipe = m.facts.recipe
    if recipe is None or recipe.decay < STRONG or not recipe.decayed_vectors:
        return None
    if not any("Norm" in name for model in m.facts.models for name in model.layers):
        return None
    return spoken(
        CARD,
        m,
        title="Weight decay acts on norms and biases",
        evidence=f"A weight decay of {recipe.decay:g} acts on {recipe.decayed_vectors} norm weights and biases. What "
        "that costs in hours is unknown.",
        helps="two groups: p.dim() >= 2 with weight decay, the others with weight_decay=0.0",
        severity="note",
    )
