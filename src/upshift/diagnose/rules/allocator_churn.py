"""Large buffers are taken from and given back to the system in every step."""

from __future__ import annotations

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, known, on_cpu, percent, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="allocator_churn",
    summary="glibc's allocator returns large buffers to the system, which hands them out again page by page.",
    source="glibc manual, Malloc Tunable Parameters (M_MMAP_THRESHOLD); PyTorch tuning guide, jemalloc and TCMalloc",
    triggers="on a CPU under glibc's allocator: 64 MiB or more go through a step's operations, forward and backward "
    "are 30 % of it or more, and page faults, where they were counted, 2 % or more",
    limits="How many faults go is assumed (half). Without a count of faults, usual gains are all there is.",
    techniques=("allocator",),
)
LEAST_BYTES, LEAST = 64 * 2**20, 0.3
#: The least share of the step worth a word.
LEAST_FAULTS = 0.02


def rule(m: Measurement) -> Finding | None:
    """Speaks on the bytes that the operations of a step take and give."""
    share, floor = share_of(m, "forward", "backward"), m.floor
    if not on_cpu(m) or m.facts.allocator != "glibc" or floor is None or share.value is None or share.value < LEAST:
        return None
    moved = floor.bytes_moved.high if floor.bytes_moved.high is not None else known(floor.bytes_moved)
    if moved is None or moved < LEAST_BYTES:
        return None
    faults, each, step = m.facts.page_faults, m.facts.fault_seconds, m.anatomy.step.value
    if faults is not None and each is not None and step:
        return _by_faults(faults, each, step)
    predicted = gain(share, 1.05, high=1.4)
    return Finding(
        rule=CARD.name,
        title="The system's allocator on large buffers",
        evidence=f"The operations of a step read and write {units.binary(moved)} under glibc's allocator; forward and "
        f"backward are {percent(share)} of the step.",
        share=share,
        helps="an allocator, or allocator settings, that keep large buffers instead of returning them to the system",
        gain=predicted,
        rests_on="usual gains (5 %, at most 40 % of forward and backward); page faults were not counted",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )


def _by_faults(faults: float, each: float, step: float) -> Finding | None:
    share = min(faults * each / step, 0.9)
    if share < LEAST_FAULTS:
        return None
    seconds = estimated(share, "fraction", share / 2, share)
    predicted = gain(seconds, 2.0, high=20.0)
    return Finding(
        rule=CARD.name,
        title="Memory is handed out anew in every step",
        evidence=f"{faults:,.0f} page faults a step under glibc's allocator, about {units.seconds(share * step)} of "
        f"{units.seconds(step)}.",
        share=seconds,
        helps="an allocator, or allocator settings, that keep large buffers instead of returning them to the system",
        gain=predicted,
        rests_on=f"half of the faults gone, {each * 1e6:.2g} us each as measured here",
        techniques=CARD.techniques,
        severity=severity(seconds, predicted),
    )
