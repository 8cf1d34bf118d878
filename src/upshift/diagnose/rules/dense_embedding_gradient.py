"""A large embedding table gets a gradient as large as itself, for a few rows."""

from __future__ import annotations

import math

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known, layer_count, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="dense_embedding_gradient",
    summary="The gradient of a large embedding table is dense, though a batch reads a few of its rows.",
    source="torch.nn.Embedding documentation, sparse; torch.optim.SparseAdam",
    triggers="an embedding layer, 1 million parameters or more of which most see no product, and backward and "
    "optimizer that take half the step or more",
    limits="Sparse gradients need an optimizer that takes them (SGD without momentum or decay, Adagrad, SparseAdam), "
    "and Adam's moments then only move for the rows read.",
)
LEAST, LARGE = 0.5, 1_000_000
#: A product does 6 operations a parameter and sample (forward 2, backward 4), an optimizer up to about 20 a parameter.
MOST_FLOPS = 30.0


def rule(m: Measurement) -> Finding | None:
    """Speaks on FLOPs a parameter."""
    step, flops = known(m.anatomy.step), known(m.floor.flops) if m.floor is not None else None
    forward, backward, optimizer = (known(share_of(m, name)) for name in ("forward", "backward", "optimizer"))
    parameters = sum(item.parameters for item in m.facts.optimizers)
    if not step or flops is None or forward is None or backward is None or optimizer is None or parameters < LARGE:
        return None
    if not layer_count(m, ("Embedding", "EmbeddingBag")) or any(item.sparse for item in m.facts.optimizers):
        return None
    share = share_of(m, "backward", "optimizer")
    if share.value is None or share.value < LEAST or flops > MOST_FLOPS * parameters:
        return None
    # Without the table's gradient, backward is about twice the forward pass.
    saved = optimizer + max(0.0, backward - 2.0 * forward)
    likely = amdahl(saved, math.inf)
    predicted = estimated(likely, "ratio", 1.0, max(likely, amdahl(share.value, math.inf)))
    return Finding(
        rule=CARD.name,
        title="The gradient of a large table is dense",
        evidence=f"{parameters:,} parameters are updated for {units.si(flops, 'FLOP')} of arithmetic a step, so most "
        f"belong to an embedding; backward and optimizer are {units.percent(share.value)} of the step.",
        share=share,
        helps="nn.Embedding(sparse=True), with an optimizer that takes sparse gradients",
        gain=predicted,
        rests_on="the optimizer gone, and backward twice the forward pass",
        edit=m.script,
        severity=severity(share, predicted),
    )
