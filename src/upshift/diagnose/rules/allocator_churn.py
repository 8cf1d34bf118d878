"""Large buffers are taken from and given back to the system in every step."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, known, on_cpu, percent, severity, share_of
from upshift.records import Finding, Measurement

CARD = FindingCard(
    name="allocator_churn",
    summary="glibc's allocator returns large buffers to the system, which hands them out again page by page.",
    source="glibc manual, Malloc Tunable Parameters (M_MMAP_THRESHOLD); PyTorch tuning guide, jemalloc and TCMalloc",
    triggers="on a CPU under glibc's allocator: 64 MiB or more go through a step's operations",
    limits="Page faults are not measured; the bytes are the sum over all operations, not what is allocated.",
    techniques=("allocator",),
)
LEAST_BYTES, LEAST = 64 * 2**20, 0.3


def rule(m: Measurement) -> Finding | None:
    """Speaks on the bytes that the operations of a step take and give."""
    share, floor = share_of(m, "forward", "backward"), m.floor
    if not on_cpu(m) or m.facts.allocator != "glibc" or floor is None or share.value is None or share.value < LEAST:
        return None
    moved = floor.bytes_moved.high if floor.bytes_moved.high is not None else known(floor.bytes_moved)
    if moved is None or moved < LEAST_BYTES:
        return None
    predicted = gain(share, 1.05, high=1.4)
    return Finding(
        rule=CARD.name,
        title="The system's allocator on large buffers",
        evidence=f"The operations of a step read and write {units.binary(moved)} under glibc's allocator; forward and "
        f"backward are {percent(share)} of the step.",
        share=share,
        helps="an allocator, or allocator settings, that keep large buffers instead of returning them to the system",
        gain=predicted,
        rests_on="usual gains (5 %, at most 40 % of forward and backward); page faults are not measured",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
