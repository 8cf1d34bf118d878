"""Forward and backward are far above what their arithmetic and memory traffic need."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known, least_seconds, on_cpu, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="compile_candidate",
    summary="Much of forward and backward is neither arithmetic nor memory traffic: many small operations.",
    source="Ansel et al. 2024, PyTorch 2: TorchDynamo and TorchInductor; Williams et al. 2009, Roofline",
    triggers="forward + backward are half the step or more and at least twice their floor; a compiler is there",
    limits="Compilation takes seconds to minutes and pays back only over many steps; changing shapes compile again.",
    techniques=("compile",),
)
LEAST, ABOVE_FLOOR = 0.5, 2.0
#: How many times as fast forward and backward usually become: of small operations, and of large ones, where only
#: passes over memory are joined.
SMALL, LARGE = 1.2, 1.08
#: Seconds of forward and backward a layer from which on a CPU its operations are large.
LARGE_LAYER = 2e-3


def rule(m: Measurement) -> Finding | None:
    """Speaks on the gap between forward + backward and the roofline floor in the dtype in use."""
    step, share, least = known(m.anatomy.step), share_of(m, "forward", "backward"), least_seconds(m.floor)
    if least is None or m.facts.create_graph or not step or share.value is None or share.value < LEAST:
        return None
    if any(item.compiled for item in m.facts.models) or (on_cpu(m) and not m.facts.compiler):
        return None
    spent = share.value * step
    if spent < ABOVE_FLOOR * least:
        return None
    best = min(4.0, spent / least) if least > 0 else 4.0
    likely = SMALL if _small(m, spent) else LARGE
    predicted = estimated(
        amdahl(share.value, likely), "ratio", 1.0, max(amdahl(share.value, best), amdahl(share.value, likely))
    )
    total = m.facts.steps_total
    planned = f" The script plans {total:,} steps." if total else ""
    return Finding(
        rule=CARD.name,
        title="Many small operations" if likely == SMALL else "Above the floor of arithmetic and memory traffic",
        evidence=f"Forward and backward take {units.seconds(spent)} a step; their arithmetic and memory traffic need "
        f"{units.seconds(least)} here.{planned}",
        share=share,
        helps="compiling the model, which joins small operations into fewer kernels",
        gain=predicted,
        rests_on=f"forward and backward made {likely:g} times as fast; at most their floor, or 4 times",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )


def _small(m: Measurement, spent: float) -> bool:
    """Whether operations are short; on an accelerator launching them is what counts. Unknown layers count as small."""
    layers = sum(sum(item.layers.values()) for item in m.facts.models if item.trained)
    passes = layers * max(m.anatomy.micro_batches.or_else(1.0), 1.0)
    return not on_cpu(m) or not layers or spent < LARGE_LAYER * passes
