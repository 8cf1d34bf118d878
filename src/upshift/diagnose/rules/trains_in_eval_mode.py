"""The model is trained in evaluation mode."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import cost, spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="trains_in_eval_mode",
    summary="Training steps run with the model in evaluation mode: dropout is off, batch statistics stand still.",
    source="PyTorch documentation, Module.eval",
    triggers="a model with dropout or batch norm led into backward passes in evaluation mode, the last 3 steps or more",
    limits="Looked at for the root module only. Wanted by some who fine-tune: a note where weights were loaded and the "
    "mode was never another.",
)
STEPS = 3


def rule(m: Measurement) -> Finding | None:
    """Speaks on the mode of the models an optimizer trains."""
    recipe = m.facts.recipe
    for mode in recipe.modes if recipe is not None else ():
        if not (mode.optimized and mode.trained_in_eval and mode.mode_layers and mode.last_eval_steps >= STEPS):
            continue
        always = mode.eval_steps == mode.steps
        wanted = always and recipe is not None and recipe.loaded
        when = "all" if always else f"the last {mode.last_eval_steps:,} of"
        return spoken(
            CARD,
            m,
            title="Training runs in evaluation mode",
            evidence=f"{mode.name} was in evaluation mode in {when} {mode.steps:,} steps watched; "
            f"{', '.join(mode.mode_layers)} in it acts differently there. {cost(m)}",
            helps="model.train() before each epoch, after every model.eval()",
            severity="note" if wanted else "minor",
        )
    return None
