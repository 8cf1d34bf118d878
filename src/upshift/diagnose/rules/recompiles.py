"""A compiled model is compiled again and again."""

from __future__ import annotations

import math

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, percent, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="recompiles",
    summary="torch.compile compiles again in steady steps, most likely for new shapes.",
    source="PyTorch documentation, torch.compile troubleshooting, recompilation and dynamic shapes",
    triggers="a compiled model whose forward takes twice its backward pass or more",
    limits="Compilations are not counted: they are told from forward, in which they happen, outgrowing backward. "
    "Frozen layers look the same.",
)
RATIO = 2.0


def rule(m: Measurement) -> Finding | None:
    """Speaks on forward against backward, which has twice its arithmetic and is compiled with it."""
    forward, backward = share_of(m, "forward"), share_of(m, "backward")
    if not any(item.compiled for item in m.facts.models) or forward.value is None or backward.value is None:
        return None
    if forward.value < RATIO * backward.value:
        return None
    saved = forward.value - backward.value / 2.0
    predicted = estimated(amdahl(saved, math.inf), "ratio", 1.0, amdahl(forward.value, math.inf))
    return Finding(
        rule=CARD.name,
        title="The model is compiled again and again",
        evidence=f"Forward of a compiled model takes {percent(forward)} of the step, its backward pass "
        f"{percent(backward)}: compilation happens in steady steps.",
        share=forward,
        helps="pad batches to one or few shapes, or torch.compile(dynamic=True); TORCH_LOGS=recompiles says why",
        gain=predicted,
        rests_on="forward made half of backward",
        edit=m.script,
        severity=severity(forward, predicted),
    )
