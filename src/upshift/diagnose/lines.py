"""What a line of the training loop is for, told from its text: logging, making a batch, waiting, computing."""

from __future__ import annotations

import re
from typing import Literal

from upshift.diagnose.evidence import fitted, lines_of, on_cpu, share_of
from upshift.records import LineCost, Measurement

Purpose = Literal["log", "batch", "wait", "compute", ""]

_COMPUTE = re.compile(r"\.backward\(|\.step\(|\.zero_grad\(|loss\s*=|\b(model|net)\(|criterion\(")
_LOG = re.compile(
    r"\bprint\(|\blogg?(er|ing)?\.\w+\(|writer\.\w+\(|wandb\.log\(|mlflow\.log_|set_postfix|\.log_metrics?\("
    r"|\.writerow\(|\.(write|flush)\(|\bfsync\("
)
_READ = re.compile(r"\.item\(\)|\.tolist\(\)|\.numpy\(\)")
_BATCH = re.compile(
    r"from_numpy|np\.random|randint\(|randperm\(|torch\.stack|torch\.tensor\(\[|memmap|\.open\(|np\.load|pin_memory"
    r"|\w*batch\w*\("
)
_BATCH_FUNCTION = re.compile(
    r"batch|collate|augment|sample_|fetch|load_|next_|make_data|tokeni[sz]e|encode|preprocess", re.IGNORECASE
)
_WAIT = re.compile(
    r"\bwith\s+[\w.]*(lock|mutex|semaphore)\w*\s*:|\.acquire\(|\bsleep\(|\.wait\(|\.join\(\)|\.get\(\)|\.result\(|urlopen\("
    r"|requests\.\w+\(|subprocess\.",
    re.IGNORECASE,
)
_COMPREHENSION = re.compile(r"[\[({].*\bfor\b.+\bin\b")
_LOOP = re.compile(r"\.append\(|\w\[(?:[^\[\]]*,\s*)?[a-z]\]")
#: The line that asks a loader for its batch is part of the data phase.
_ASKS = re.compile(r"^(async )?for .+ in .+:|\bnext\(")


def purpose(line: LineCost, *, waits_on_read: bool = False) -> Purpose:
    """What a host line is for; empty where its text does not tell.

    Args:
        waits_on_read: reading a value waits for a device, and is no cost of its own.
    """
    text = line.text
    if _COMPUTE.search(text) or line.function == "forward":
        return "compute"
    if _LOG.search(text) or (not waits_on_read and _READ.search(text)):
        return "log"
    if _BATCH.search(text) or (line.function != "<module>" and _BATCH_FUNCTION.search(line.function)):
        return "batch"
    return "wait" if _WAIT.search(text) else ""


def item_by_item(line: LineCost) -> bool:
    """Whether a line looks like one of a Python loop: a comprehension, an append, or a value taken by its index."""
    return bool(_COMPREHENSION.search(line.text) or _LOOP.search(line.text))


def outside(m: Measurement) -> list[tuple[LineCost, Purpose]]:
    """Host lines outside data, model, loss and optimizer, with their purpose.

    Together they take the step's `other` time, and what of the time between forward and backward is not the loss.
    """
    waits = not on_cpu(m)
    found = [(item, purpose(item, waits_on_read=waits)) for item in lines_of(m, "host")]
    found = [(item, kind) for item, kind in found if kind != "compute" and not _ASKS.search(item.text)]
    least, most = share_of(m, "other"), share_of(m, "other", "loss")
    lines = fitted([item for item, _ in found], least, most)
    return list(zip(lines, [kind for _, kind in found], strict=True))
