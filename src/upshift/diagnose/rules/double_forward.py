"""Forward does more arithmetic than the backward pass accounts for: the model seems to run more than once for one."""

from __future__ import annotations

import math

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="double_forward",
    summary="The model runs more often than its backward pass.",
    source="Kaplan et al. 2020, Scaling Laws (backward has twice the FLOPs of forward); Amdahl 1967",
    triggers="the counted FLOPs of forward are 0.95 times those of backward or more, and what that is too much takes "
    "5 % of the step or more; all models are trained, none is compiled",
    limits="Frozen layers, of which backward has less to do, and a model of one layer, look the same. Silent where "
    "evaluation was seen, whose FLOPs would be counted as well.",
)
#: A forward pass of its own has half the arithmetic of its backward pass; as much where its first layer, whose input
#: needs no gradient, is nearly all of it. A second one brings it to as much at least.
RATIO, LEAST = 0.95, 0.05


def rule(m: Measurement) -> Finding | None:
    """Speaks on counted FLOPs: backward has twice those of the forward pass it belongs to."""
    forward = share_of(m, "forward")
    if m.floor is None or not forward.value or any(not item.trained or item.compiled for item in m.facts.models):
        return None
    done, back = m.floor.by_phase.get("forward", 0.0), m.floor.by_phase.get("backward", 0.0)
    # What is counted for evaluation is not this step's: only where each step has its extra forward pass.
    if back <= 0 or done < RATIO * back or known(m.anatomy.evaluation):
        return None
    saved = forward.value * (1.0 - back / 2.0 / done)
    if saved < LEAST:
        return None
    predicted = estimated(
        amdahl(saved, math.inf), "ratio", amdahl(saved / 2.0, math.inf), amdahl(forward.value, math.inf)
    )
    return Finding(
        rule=CARD.name,
        title="More forward passes than backward passes need",
        evidence=f"Forward does {units.si(done, 'FLOP')} a step and backward {units.si(back, 'FLOP')}, though backward "
        "has about twice the arithmetic of the forward pass it belongs to.",
        share=forward,
        helps="use the outputs of the first forward pass again, for metrics say; run what needs no gradient less often",
        gain=predicted,
        rests_on="forward left with half the arithmetic of backward",
        edit=m.script,
        severity=severity(forward, predicted),
    )
