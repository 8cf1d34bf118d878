"""Jobs trained through the real command line, and what their records say of them: shared by stall.py and goodput.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Record:
    """One start of a run, as its log tells it: windows of steps and events, as far as they were written."""

    windows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)


def start(reference: str, out: Path, *options: str, **env: str) -> subprocess.Popen[str]:
    """`upshift run --out OUT OPTIONS REFERENCE` in a process group of its own; what it says goes beside the folder."""
    command = [sys.executable, "-m", "upshift", "run", "--out", str(out), *options, reference]
    with open(f"{out}.txt", "a", encoding="utf-8") as said:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, text=True, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the whole group, and wait until it is gone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it came to its end just now
    process.wait()


def stop(process: subprocess.Popen[str], patience: float = 60.0) -> None:
    """SIGTERM to the group, which saves and ends; SIGKILL where it does not."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(patience)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        kill(process)


def records(out: Path) -> list[Record]:
    """Every start of the run in `out`, in order; lines torn by a kill are left out."""
    found: list[Record] = []
    try:
        lines = (out / "log.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if item["kind"] == "start":
            found.append(Record())
        elif found and item["kind"] == "steps":
            found[-1].windows.append(item)
        elif found:
            found[-1].events.append(item)
    return found


def train_for(seconds: float, reference: str, out: Path, *options: str, **env: str) -> Record:
    """Train until `seconds` after the first window of steps was written, then stop; what was recorded.

    Raises:
        RuntimeError: it ended by itself before that; the message holds what it said.
    """
    process = start(reference, out, *options, **env)
    try:
        until = None
        while until is None or time.monotonic() < until:
            if process.poll() is not None:
                raise RuntimeError(f"{reference} ended with {process.returncode}: {said(out)}")
            if until is None and any(item.windows for item in records(out)):
                until = time.monotonic() + seconds
            time.sleep(0.1)
        stop(process)
    finally:
        if process.poll() is None:
            kill(process)
    return records(out)[-1]


def said(out: Path, most: int = 1500) -> str:
    """The end of what a run has said."""
    return Path(f"{out}.txt").read_text(encoding="utf-8", errors="replace")[-most:]


def bounds(values: list[float]) -> tuple[float, float]:
    """Order statistics that hold the median with at least 95 % (binomial); the extremes where they are too few."""
    from math import comb

    values, drop = sorted(values), 0
    n = len(values)
    while 2 * sum(comb(n, k) for k in range(drop + 1)) / 2**n <= 0.05:
        drop += 1
    drop = max(drop - 1, 0)
    return values[drop], values[n - 1 - drop]
