"""PyTorch uses more or fewer threads than there are cores to use."""

from __future__ import annotations

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import gain, known, on_cpu, severity, share_of
from upshift.records import Finding, Measurement, Quantity, unknown

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
        predicted = _with_more(m, share, cores / threads)
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
        else "products scale with the cores, the rest of forward and backward with their square root",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )


def _with_more(m: Measurement, share: Quantity, factor: float) -> Quantity:
    """Products take what the floor of all cores says, times the cores that are idle; they scale, the rest less so."""
    products = 0.0
    if m.floor is not None and share.value:
        products = min(1.0, (known(m.floor.mfu) or 0.0) * factor / share.value)
    likely = 1.0 / (products / factor + (1.0 - products) / factor**0.5)
    return gain(share, likely, high=factor)
