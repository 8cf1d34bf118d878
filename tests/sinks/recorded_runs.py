"""A run folder as the program writes it, with figures that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upshift.records.runlog import RunLog

CLOCK = 1_790_000_000.0
WINDOWS = 6
STEPS = 10
"""Of each window."""


def losses() -> list[float]:
    """Of the windows, each exact in single precision, too."""
    return [2.0 - 0.25 * index for index in range(WINDOWS)]


def begin(folder: Path, **more: Any) -> RunLog:
    """The head of a log."""
    log = RunLog(folder)
    head = {
        "script": "train.py", "arguments": ["--lr", "0.1", "--api-key", "hunter2"], "started": "2026-09-21 10:00:00",
        "clock": CLOCK, "pid": 1, "plan": "train.upshift.toml", "techniques": {"bf16": {"dtype": "bfloat16"}},
        "environment": {"cpu": "a chip", "device": "cpu"},
    }  # fmt: skip
    log.append("start", **{**head, **more})
    return log


def window(log: RunLog, index: int) -> None:
    """Ten steps in half a second."""
    log.append(
        "steps", first=index * STEPS, n=STEPS, at=0.5 * (index + 1), seconds=0.5, loss=losses()[index],
        last_loss=losses()[index], phases={"forward": 0.2, "backward": 0.3}, evaluation=0.0, checkpoint=0.0,
    )  # fmt: skip


def write(folder: Path, *, code: int | None = 0) -> Path:
    """A whole run: windows, two evaluations, a note, resources, an end unless `code` is None."""
    log = begin(folder)
    for index in range(WINDOWS):
        window(log, index)
        if index in (2, 5):
            step = (index + 1) * STEPS
            log.append(
                "metrics", at=0.5 * (index + 1), text="accuracy", step=step,
                values={"accuracy": 0.5 + index / 16, "broken": None},
            )  # fmt: skip
    log.append("no effect", at=3.0, text="bf16: nothing to do")
    if code is not None:
        log.append("end", code=code, how="finished", seconds=3.25, steps=WINDOWS * STEPS)
    log.close()
    lines = [{"kind": "head", "pid": 1, "cores": 2.0}]
    lines += [{"kind": "sample", "at": float(at), "cpu_seconds": 1.5 * at, "memory": 2.0**30} for at in (0, 1, 2)]
    lines += [{"kind": "alarm", "at": 2.0, "name": "memory", "text": "out of memory soon"}]
    with open(folder / "resources.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder
