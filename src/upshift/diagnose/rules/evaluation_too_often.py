"""Evaluation takes a large part of the run."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known
from upshift.records import Finding, Measurement, Quantity
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="evaluation_too_often",
    summary="Much of the run is evaluation.",
    source="Amdahl 1967",
    triggers="evaluation takes 20 % or more of the time watched",
    limits="Seen over the time watched only: a first evaluation at the start weighs too much in it.",
)
LEAST = 0.2


def rule(m: Measurement) -> Finding | None:
    """Speaks on the time watched: steady steps, warm-up and evaluation."""
    spent, step = known(m.anatomy.evaluation), known(m.anatomy.step)
    steady = m.anatomy.steps_seen - m.anatomy.warmup_steps
    if not spent or not step or steady <= 0:
        return None
    training = step * steady + (known(m.anatomy.warmup) or 0.0)
    share = spent / (spent + training)
    if share < LEAST:
        return None
    return Finding(
        rule=CARD.name,
        title="Evaluation takes a large part of the run",
        evidence=f"{units.seconds(spent)} went into evaluating beside {units.seconds(training)} of training: "
        f"{units.percent(share)} of the time watched.",
        share=Quantity(value=share, unit="fraction", n=m.anatomy.evaluation.n),
        helps="evaluate less often, or on a fixed part of the validation set in between",
        gain=estimated(amdahl(share, 2.0), "ratio", amdahl(share, 1.5), amdahl(share, 10.0)),
        rests_on="the whole run, not the step: half as often (between two thirds and a tenth)",
        edit=m.script,
        severity="minor",
    )
