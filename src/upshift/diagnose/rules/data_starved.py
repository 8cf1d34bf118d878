"""The training loop waits in the DataLoader's `next()`."""

from __future__ import annotations

import math
import re

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import amdahl, duration, lines_of, on_cpu, percent, quote, severity, share_of
from upshift.records import Finding, LoaderFacts, Measurement
from upshift.records.quantity import estimated

CARD = FindingCard(
    name="data_starved",
    summary="The training step waits for its next batch.",
    source="Mohan et al. 2021, Analyzing and Mitigating Data Stalls in DNN Training; torch.utils.data documentation",
    triggers="5 % of the step or more is spent blocked in next() of a training DataLoader",
    limits="Workers need free cores: on a CPU they share them with the training, which bounds the gain. Whether a "
    "cache may be used is told from the text of the dataset's lines; only the technique itself proves it.",
    techniques=("loader", "cache"),
)
LEAST = 0.05
#: A batch gathered from memory against one made sample by sample.
CACHED = 10.0
#: What is supposed of loading that no more workers help: its lines made so many times as fast.
FASTER = 2.0
_RANDOM = re.compile(r"rand|augment|flip|crop|jitter|noise|perm|choice|shuffle|drop|sample", re.IGNORECASE)


def rule(m: Measurement) -> Finding | None:
    """Speaks on the `data` phase, with a training DataLoader."""
    loaders = [item for item in m.facts.loaders if item.training]
    share = share_of(m, "data")
    if not loaders or share.value is None or share.value < LEAST:
        return None
    loader = loaders[0]
    wait = next((item.seconds for item in m.anatomy.phases if item.name == "data"), None)
    evidence = f"{percent(share)} of each step"
    if wait is not None and wait.known:
        evidence += f", {duration(wait)},"
    evidence += f" is spent waiting for {loader.dataset} with {loader.workers} workers"
    if loader.batch_size:
        evidence += f" and batches of {loader.batch_size}"
    if lines := lines_of(m, "data"):
        evidence += f"; most of it in {quote(lines[0])}"
    cores = m.facts.cores
    if _looks_fixed(m, loader):
        likely = amdahl(share.value, CACHED)
        rests = f"a cache that makes loading {CACHED:g} times as fast: no line seen of the dataset draws random numbers"
    elif on_cpu(m):
        # Loading runs on one core, or one a worker, while others idle; at best it is spread over all of them.
        spread = cores / max(loader.workers, 1)
        likely = amdahl(share.value, max(spread, FASTER))
        rests = f"loading spread over {cores or 'an unknown number of'} cores shared with the training; at most no wait"
        if spread < FASTER:
            rests = f"loading made {FASTER:g} times as fast, as no core is left for more workers; at most no wait"
    else:
        likely = amdahl(share.value, math.inf) if cores > 1 else 1.0
        rests = "loading fully hidden behind the device's work"
    high = amdahl(share.high if share.high is not None else share.value, math.inf)
    predicted = estimated(max(1.0, likely), "ratio", 1.0, max(high, likely))
    more = "more workers" if loader.workers else "worker processes"
    return Finding(
        rule=CARD.name,
        title="Waiting for data",
        evidence=evidence + ".",
        share=share,
        helps=f"{more} that prepare batches ahead, or a cache of the part of the dataset that never changes",
        gain=predicted,
        rests_on=rests,
        techniques=CARD.techniques,
        severity=severity(share, predicted),
    )


def _looks_fixed(m: Measurement, loader: LoaderFacts) -> bool:
    """Whether a cache may serve the samples: made here, one by one, by lines none of which looks random."""
    lines = lines_of(m, "data")
    plain = not (loader.workers or loader.iterable or loader.custom_fetch)
    return plain and bool(lines) and not any(_RANDOM.search(item.text + item.function) for item in lines)
