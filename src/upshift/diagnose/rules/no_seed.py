"""No seed is set, so no two runs can be compared."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.training import own_loop, spoken
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="no_seed",
    summary="No seed is set: two runs differ by chance, and neither can be repeated.",
    source="PyTorch documentation, Reproducibility",
    triggers="torch.manual_seed was not called, and nothing in the source is named like a seed",
    limits="A note only. A script in which nothing is random needs none.",
)


def rule(m: Measurement) -> Finding | None:
    """Speaks where no seed was set while watched and the source names none."""
    recipe = own_loop(m)
    if recipe is None or m.facts.seeded or "seed" in (recipe.declared or ()):
        return None
    return spoken(
        CARD,
        m,
        title="No seed is set",
        evidence="torch.manual_seed was not called, and the source names no seed. Two runs differ by their initial "
        "weights and the order of their data. How many hours repeated runs cost is unknown.",
        helps="torch.manual_seed(0) before the model and the loaders are made",
        severity="note",
    )
