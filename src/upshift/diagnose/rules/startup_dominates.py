"""Start-up and warm-up are a large part of a short run."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known
from upshift.records import Finding, Measurement, Quantity
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="startup_dominates",
    summary="So short a run is mostly start-up: a faster step changes little.",
    source="Amdahl 1967",
    triggers="start-up and warm-up are 30 % or more of the forecast of the whole run",
    limits="Needs the number of steps the script plans; evaluation is left out of the forecast where it is unknown.",
)
LEAST = 0.3


def rule(m: Measurement) -> Finding | None:
    """Speaks where the number of planned steps is known."""
    step, startup, total = known(m.anatomy.step), known(m.anatomy.startup), m.facts.steps_total
    if not step or startup is None or not total or total <= 0:
        return None
    warmup = known(m.anatomy.warmup) or 0.0
    before = startup + warmup
    steady = max(0, total - m.anatomy.warmup_steps) * step
    whole = before + steady + (known(m.anatomy.evaluation) or 0.0)
    share = before / whole if whole > 0 else 0.0
    if share < LEAST:
        return None
    return Finding(
        rule=CARD.name,
        title="Start-up dominates this run",
        evidence=f"{units.seconds(before)} of start-up and warm-up come before {units.seconds(steady)} of training "
        f"({total:,} steps planned): {units.percent(share)} of the run.",
        share=Quantity(value=share, unit="fraction", n=1, basis="estimated"),
        helps="fewer restarts, or lighter imports and data preparation; techniques with a one-off cost do not pay back",
        gain=estimated(amdahl(share, 1.5), "ratio", 1.0, amdahl(share, 4.0)),
        rests_on="the whole run, not the step: start-up made 1.5 (at most 4) times as fast",
        edit=m.script,
        severity="minor",
    )
