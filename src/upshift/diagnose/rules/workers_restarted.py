"""The loader starts its worker processes anew in every epoch, and epochs are short."""

from __future__ import annotations

import math

from upshift import units
from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, known, severity, share_of
from upshift.records import Finding, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="workers_restarted",
    summary="Loader workers are started anew in every epoch.",
    source="torch.utils.data documentation, persistent_workers",
    triggers="a training loader with workers that do not persist, and 5 % of the step or more in waiting, of which "
    "starting workers may be a fifth or more",
    limits="The start of workers is not timed apart from waiting for data; its cost is assumed.",
    techniques=("loader",),
)
LEAST, LEAST_PART = 0.05, 0.2
#: Seconds to fork a worker from a process with torch in it and get its first batch.
START = 0.05


def rule(m: Measurement) -> Finding | None:
    """Speaks on the wait of a whole epoch against what starting its workers costs."""
    loader = next((item for item in m.facts.loaders if item.training and item.workers > 0), None)
    share, step = share_of(m, "data"), known(m.anatomy.step)
    if loader is None or loader.persistent or not loader.samples or not loader.batch_size:
        return None
    if share.value is None or share.value < LEAST or not step:
        return None
    batches = math.ceil(loader.samples / loader.batch_size)
    waited = share.value * step * batches / max(m.anatomy.micro_batches.or_else(1.0), 1.0)
    part = min(1.0, START * loader.workers / waited)
    if part < LEAST_PART:
        return None
    predicted = estimated(
        amdahl(share.value * part, math.inf), "ratio", amdahl(share.value * part / 2, math.inf),
        amdahl(share.value, math.inf),
    )  # fmt: skip
    return Finding(
        rule=CARD.name,
        title="Workers are started anew in every epoch",
        evidence=f"An epoch has {batches:,} batches and waits {units.seconds(waited)} for them "
        f"({units.percent(share.value)} of the step); it starts {loader.workers} workers, which end with it.",
        share=share,
        helps="persistent_workers=True",
        gain=predicted,
        rests_on=f"starting a worker taken as {units.seconds(START)}; at most no wait at all",
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )
