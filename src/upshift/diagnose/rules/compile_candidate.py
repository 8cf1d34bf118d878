"""Forward and backward are far above what their arithmetic and memory traffic need."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known, on_cpu, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="compile_candidate",
    summary="Much of forward and backward is neither arithmetic nor memory traffic: many small operations.",
    source="Ansel et al. 2024, PyTorch 2: TorchDynamo and TorchInductor; Williams et al. 2009, Roofline",
    triggers="forward + backward are half the step or more and at least twice their floor; a compiler is there",
    limits="Compilation takes minutes and pays back only over many steps; changing shapes compile again.",
    techniques=("compile",),
)
LEAST, ABOVE_FLOOR = 0.5, 2.0


def rule(m: Measurement) -> Finding | None:
    """Speaks on the gap between forward + backward and the roofline floor in the dtype in use."""
    step, share, floor = known(m.anatomy.step), share_of(m, "forward", "backward"), m.floor
    if floor is None or not step or share.value is None or share.value < LEAST:
        return None
    if any(item.compiled for item in m.facts.models) or (on_cpu(m) and not m.facts.compiler):
        return None
    flops, peak, memory = known(floor.flops), known(floor.peak_flops), known(floor.bandwidth_floor)
    if flops is None or not peak or memory is None or m.facts.create_graph:
        return None
    least = max(flops / peak, memory)
    spent = share.value * step
    if spent < ABOVE_FLOOR * least:
        return None
    best = min(4.0, spent / least) if least > 0 else 4.0
    predicted = estimated(amdahl(share.value, 1.2), "ratio", 1.0, amdahl(share.value, best))
    total = m.facts.steps_total
    planned = f" The script plans {total:,} steps." if total else ""
    return Finding(
        rule=CARD.name,
        title="Many small operations",
        evidence=f"Forward and backward take {units.seconds(spent)} a step; their arithmetic and memory traffic need "
        f"{units.seconds(least)} here.{planned}",
        share=share,
        helps="compiling the model, which joins small operations into fewer kernels",
        gain=predicted,
        rests_on="forward and backward made 1.2 times as fast; at most their floor, or 4 times",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
