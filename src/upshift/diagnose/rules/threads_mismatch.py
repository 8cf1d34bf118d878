"""PyTorch uses more or fewer threads than there are cores to use."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, on_cpu, severity, share_of
from upshift.records import Finding, Measurement, unknown

CARD = FindingCard(
    name="threads_mismatch",
    summary="The number of threads does not fit the cores this process may use.",
    source="PyTorch documentation, CPU threading and TorchScript inference (tuning the number of threads)",
    triggers="on a CPU: intra-op threads differ from usable cores (affinity and container quota)",
    limits="Fewer threads than cores can be right: small products, or loader workers that need cores.",
    techniques=("threads",),
)


def rule(m: Measurement) -> Finding | None:
    """Speaks on facts of the process; the gain is unknown where the phases are."""
    threads, cores = m.facts.threads, m.facts.cores
    if not on_cpu(m) or threads <= 0 or cores <= 0 or threads == cores:
        return None
    share = share_of(m, "forward", "backward")
    many = threads > cores
    if share.value is None:
        predicted = unknown("ratio")
    elif many:
        predicted = gain(share, 1.2, high=2.0)
    else:
        # Cores without a thread: at best forward and backward scale with them.
        predicted = gain(share, (cores / threads) ** 0.5, high=cores / threads)
    return Finding(
        rule=CARD.name,
        title=f"{threads} threads on {cores} cores",
        evidence=f"PyTorch runs {threads} intra-op threads; this process may use {cores} cores"
        + (", so threads wait for one another." if many else ", so cores are idle in forward and backward."),
        share=share,
        helps="a number of threads that fits the cores",
        gain=predicted,
        rests_on="usual loss by too many threads (1.2, at most 2 times)"
        if many
        else "forward and backward scaling with the square root of the added cores; at most with the cores",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
