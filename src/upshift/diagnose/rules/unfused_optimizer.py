"""The optimizer updates tensor by tensor where one fused kernel would do."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, on_cpu, percent, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="unfused_optimizer",
    summary="The optimizer makes many passes over the parameters instead of one.",
    source="torch.optim documentation, fused and foreach implementations",
    triggers="the optimizer takes 3 % of the step or more, is one with a fused kernel, and does not use it",
    limits="The gain depends on the number and size of the tensors; it is measured by a trial.",
    techniques=("fused",),
)
LEAST = 0.03
FUSABLE = ("Adam", "AdamW", "SGD", "Adagrad")


def rule(m: Measurement) -> Finding | None:
    """Speaks on the `optimizer` phase."""
    share = share_of(m, "optimizer")
    candidates = [
        item for item in m.facts.optimizers
        if item.name in FUSABLE and item.fused is not True and not item.closure and not item.sparse
    ]  # fmt: skip
    if share.value is None or share.value < LEAST or not candidates:
        return None
    one = candidates[0]
    # On accelerators the default is already the grouped implementation; on CPU it is a Python loop over tensors.
    grouped = one.foreach is True or (one.foreach is None and not on_cpu(m))
    predicted = gain(share, 1.3, high=2.5) if grouped else gain(share, 2.0, high=6.0)
    how = "grouped kernels" if grouped else "one tensor at a time"
    return Finding(
        rule=CARD.name,
        title="The optimizer is not fused",
        evidence=f"{one.name} takes {percent(share)} of each step, updating {one.tensors:,} tensors "
        f"({one.parameters:,} parameters) by {how}.",
        share=share,
        helps="the optimizer's fused kernel: one pass over parameters, gradients and state",
        gain=predicted,
        rests_on="the optimizer made " + ("1.3 (at most 2.5)" if grouped else "2 (at most 6)") + " times as fast",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
