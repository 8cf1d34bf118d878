"""Saving checkpoints takes a visible part of the run."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known
from upshift.records import Finding, Measurement, Quantity
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="checkpoint_too_often",
    summary="Much of the run is spent saving checkpoints.",
    source="Young 1974, A first order approximation to the optimum checkpoint interval",
    triggers="saving takes 5 % or more of the time watched, in two steps or more",
    limits="Seen over the time watched only; saves that did not fall into it are unknown, not zero.",
)
LEAST = 0.05


def rule(m: Measurement) -> Finding | None:
    """Speaks on the time watched: steady steps, warm-up and saving."""
    spent, step = known(m.anatomy.checkpointing), known(m.anatomy.step)
    steady = m.anatomy.steps_seen - m.anatomy.warmup_steps
    # A single save has no rhythm yet: files written before the training look the same.
    if not spent or not step or steady <= 0 or m.anatomy.checkpointing.n < 2:
        return None
    training = step * steady + (known(m.anatomy.warmup) or 0.0)
    share = spent / (spent + training)
    if share < LEAST:
        return None
    return Finding(
        rule=CARD.name,
        title="Checkpoints are saved too often",
        evidence=f"{units.seconds(spent)} went into saving checkpoints beside {units.seconds(training)} of training: "
        f"{units.percent(share)} of the time watched.",
        share=Quantity(value=share, unit="fraction", n=m.anatomy.checkpointing.n),
        helps="save less often: about every sqrt(2 C M) seconds, where one save costs C and failures are M apart",
        gain=estimated(amdahl(share, 2.0), "ratio", amdahl(share, 1.5), amdahl(share, 10.0)),
        rests_on="the whole run, not the step: half as often (between two thirds and a tenth)",
        edit=m.script,
        severity="minor",
    )
