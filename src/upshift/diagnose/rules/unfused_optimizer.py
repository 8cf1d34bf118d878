"""The optimizer updates tensor by tensor where one fused kernel would do."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, known, on_cpu, percent, severity, share_of
from upshift.records import Finding, Measurement, OptimizerFacts

CARD = FindingCard(
    name="unfused_optimizer",
    summary="The optimizer makes many passes over the parameters instead of one.",
    source="torch.optim documentation, fused and foreach implementations",
    triggers="the optimizer takes 3 % of the step or more, is one with a fused kernel, and does not use it",
    limits="The gain depends on the number and size of the tensors; it is measured by a trial.",
    techniques=("fused",),
)
LEAST = 0.03
#: A loop over tensors loses its overhead for each, but is not trusted to become faster than this.
USUAL, MOST = 2.0, 10.0
#: Seconds a fused kernel spends on each tensor beside moving its bytes.
EACH = 2e-6
#: Times an optimizer with two moments reads or writes as many bytes as the parameters have; others do with less.
PASSES = 7
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
    likely, most = (1.3, 2.5) if grouped else (_factor(m, one, share.value), MOST)
    predicted = gain(share, likely, high=most)
    how = "grouped kernels" if grouped else "one tensor at a time"
    return Finding(
        rule=CARD.name,
        title="The optimizer is not fused",
        evidence=f"{one.name} takes {percent(share)} of each step, updating {one.tensors:,} tensors "
        f"({one.parameters:,} parameters) by {how}.",
        share=share,
        helps="the optimizer's fused kernel: one pass over parameters, gradients and state",
        gain=predicted,
        rests_on=f"the optimizer made {likely:.2g} (at most {most:g}) times as fast"
        + ("" if grouped else ": one pass over parameters, gradients and state at this machine's bandwidth"),
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )


def _factor(m: Measurement, one: OptimizerFacts, share: float) -> float:
    """How many times as fast a single pass at two thirds of the probed bandwidth would be; usual where not known."""
    step, bandwidth = known(m.anatomy.step), known(m.floor.bandwidth) if m.floor is not None else None
    if not step or not bandwidth:
        return USUAL
    size = 8 if one.dtypes == ("float64",) else 4
    fused = one.parameters * size * PASSES / (bandwidth * 2 / 3) + one.tensors * EACH
    return min(max(share * step / fused, 1.0), MOST) if fused > 0 else USUAL
