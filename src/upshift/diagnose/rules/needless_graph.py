"""The backward pass records a graph of the gradients, and nothing differentiates it."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, percent, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="needless_graph",
    summary="create_graph is on, but gradients of gradients are not used.",
    source="torch.autograd.backward documentation, create_graph",
    triggers="backward with create_graph, one backward pass a step that is 10 % of it or more, and no line that calls "
    "autograd.grad",
    limits="A second derivative taken in a library, or now and then, is not seen.",
)
LEAST = 0.1


def rule(m: Measurement) -> Finding | None:
    """Speaks where a graph was asked for and the step has a single backward pass."""
    share, passes = share_of(m, "backward"), m.anatomy.micro_batches.value
    if not m.facts.create_graph or passes is None or passes > 1 or share.value is None or share.value < LEAST:
        return None
    if any("autograd.grad(" in line.text or " grad(" in line.text for line in m.lines):
        return None
    predicted = gain(share, 1.25, high=2.0)
    return Finding(
        rule=CARD.name,
        title="A graph of the gradients that nothing uses",
        evidence=f"backward(create_graph=True) is called once a step; backward is {percent(share)} of it.",
        share=share,
        helps="backward() without create_graph, which also frees the memory of the first graph",
        gain=predicted,
        rests_on="backward made 1.25 (at most 2) times as fast",
        edit=m.script,
        severity=severity(share, predicted),
    )
