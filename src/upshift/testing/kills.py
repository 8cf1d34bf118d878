"""Trainings that are killed again and again, and compared bit by bit with one that was not.

The children are forked from a process that has torch loaded, so that a kill costs a fraction of a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upshift.checkpoint.compare import differences
from upshift.checkpoint.store import Store
from upshift.engine.job import Job
from upshift.engine.run import train_job
from upshift.engine.settings import Execution

#: What a child exits with when it did not come to its end.
FAILED = 99


@dataclass
class Counts:
    """What came of the kills; everything but `kills`, `in_save` and `runs` is to be 0."""

    runs: int = 0
    kills: int = 0
    in_save: int = 0
    unreadable: int = 0
    lost: int = 0
    different: int = 0
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Sum."""
        for name in ("runs", "kills", "in_save", "unreadable", "lost", "different", "failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes += other.notes


def train_in_child(job: Job, out: Path, log: Path, settings: dict[str, Any]) -> int:
    """Fork a child, leader of a process group, that trains `job` into `out`; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        # Unbuffered and whole lines: a kill tears nothing.
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

        def on_batch(step: int, epoch: int, rows: Any) -> None:
            os.write(fd, f"\n{json.dumps([step, epoch, [int(row) for row in rows]])}\n".encode())

        result = train_job(job, Execution(out=out, on_batch=on_batch, **settings))
        os._exit(result.code)
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED)


def killed_until_done(job: Job, folder: Path, *, kills: int, seed: int, settings: dict[str, Any],
                      longest: float) -> Counts:  # fmt: skip
    """One training, killed up to `kills` times (half of them while a checkpoint is being written), then let go on.

    Args:
        longest: seconds a child is let live at most before it is killed.
    """
    draw = random.Random(seed)
    counts = Counts(runs=1)
    whole, log_whole = folder / f"whole-{seed}", folder / f"whole-{seed}.log"
    if _wait(train_in_child(job, whole, log_whole, settings)) != 0:
        counts.failed += 1
        return counts
    out, log = folder / f"killed-{seed}", folder / f"killed-{seed}.log"
    while counts.kills < kills:
        pid = train_in_child(job, out, log, settings)
        code = _kill(pid, out, draw, longest, counts)
        if code is not None:
            counts.failed += code != 0
            break
        _look(out, counts, seed)
    else:
        counts.failed += _wait(train_in_child(job, out, log, settings)) != 0
    if not counts.failed:
        _compare(whole, out, log_whole, log, counts, seed)
    return counts


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill(pid: int, out: Path, draw: random.Random, longest: float, counts: Counts) -> int | None:
    """Kill the child's group at a random moment; its exit code where it came to its end before that."""
    in_save = draw.random() < 0.5
    until = time.monotonic() + draw.uniform(0.0, longest)
    late = time.monotonic() + 3.0 * longest + 2.0
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return _wait(pid)
        now = time.monotonic()
        saving = in_save and any((out / "checkpoints").glob(".tmp-*"))
        if (now > until and (saving or not in_save)) or now > late:
            break
        if not in_save or now < until:
            time.sleep(0.001)
    before = _newest(out)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it has not made its group yet
    _wait(pid)
    counts.kills += 1
    counts.in_save += saving
    _BEFORE[out] = before
    return None


_BEFORE: dict[Path, int] = {}


def _newest(out: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in (out / "checkpoints").glob("step-*")), default=-1)


def _look(out: Path, counts: Counts, seed: int) -> None:
    """After a kill everything that was there can be read, and nothing that was whole is gone."""
    store = Store(out)
    found = store.checkpoints(verify=True)
    bad = [item for item in found if not item.verified]
    counts.unreadable += len(bad)
    newest = max((item.step for item in found if item.verified), default=-1)
    if newest < _BEFORE.get(out, -1):
        counts.lost += 1
    counts.notes += [f"seed {seed}: {item.path.name}: {item.problem}" for item in bad]


def _compare(whole: Path, out: Path, log_whole: Path, log: Path, counts: Counts, seed: int) -> None:
    expected, found = _final(whole), _final(out)
    # How long it took is not part of the training.
    for state in (expected, found):
        state["progress"].pop("seconds", None)
        state["results"].pop("reached", None)
    problems = differences(expected, found)
    if samples_by_step(log_whole) != samples_by_step(log):
        problems.append("the samples")
    if problems:
        counts.different += 1
        counts.notes.append(f"seed {seed}: differs in {', '.join(problems[:4])}")


def _final(out: Path) -> Any:
    store = Store(out)
    newest = store.newest()
    assert newest is not None
    return store.load(newest)[0]


def samples_by_step(log: Path) -> dict[int, Any]:
    """Step -> epoch and rows, as they were trained last."""
    found: dict[int, Any] = {}
    for line in log.read_bytes().splitlines():
        try:
            step, epoch, rows = json.loads(line)
        except ValueError:
            continue
        found[step] = (epoch, tuple(rows))
    return found
