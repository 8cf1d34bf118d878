"""The model is evaluated in training mode."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="evaluates_in_train_mode",
    summary="Evaluation runs in training mode: dropout is on, and batch statistics take evaluation data in.",
    source="PyTorch documentation, Module.eval",
    triggers="one model, with dropout or batch norm; evaluation was seen, nothing was ever put into evaluation mode",
    limits="Silent with several models. Dropout kept on to estimate uncertainty, and batch statistics taken on purpose "
    "look the same.",
)


def rule(m: Measurement) -> Finding | None:
    """Speaks where the only model was evaluated and never left training mode."""
    recipe = m.facts.recipe
    if recipe is None or not recipe.evaluations or len(recipe.modes) != 1:
        return None
    mode = recipe.modes[0]
    if not mode.optimized or not mode.mode_layers or mode.put_in_eval or mode.eval_steps:
        return None
    return spoken(
        CARD,
        m,
        title="Evaluation runs in training mode",
        evidence=f"{recipe.evaluations:,} evaluations were seen, and {mode.name} was never put into evaluation mode; "
        f"{', '.join(mode.mode_layers)} in it acts differently there. What it costs in hours is unknown: the figures "
        "it is judged by are off.",
        helps="model.eval() before evaluating, model.train() after it",
    )
