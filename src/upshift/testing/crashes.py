"""Counts what checkpoints survive: kills, power losses, damage, two owners. Tests run a few, the soak script many.

Each function makes its own folders below `root`, and returns `Counts`; anything but zeros in `problems` is a defect.
"""

from __future__ import annotations

import gc
import os
import random
import select
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upshift.checkpoint.disk import Disk
from upshift.checkpoint.store import QUARANTINE, Store
from upshift.errors import CheckpointError, InUseError
from upshift.testing.disks import RecordingDisk, WatchedDisk, killed_at


@dataclass
class Counts:
    """How often something was tried, and what went wrong: lost, unreadable, left over, unnoticed, or two winners."""

    name: str
    tried: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, problems: list[str]) -> None:
        """One more try."""
        self.tried += 1
        self.problems += problems


def state(step: int) -> dict[str, Any]:
    """A small state that depends on its step: two tensors, a tuple, text."""
    import torch

    values = torch.arange(64, dtype=torch.float32) * step
    return {"model": {"weight": values, "bias": values[:3].double()}, "step": step, "rng": (step, "x" * 20)}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def recovered(folder: Path, acknowledged: int, disk: Disk | None = None) -> list[str]:
    """What is wrong after a crash, seen by the next owner: the newest must be whole, and no older than acknowledged."""
    try:
        with Store(folder, disk=disk) as store:
            newest = store.newest()
            if newest is None:
                return [f"step {acknowledged} was acknowledged and is lost"] if acknowledged else []
            problems = [] if newest.step >= acknowledged else [f"{acknowledged} is lost, {newest.step} is left"]
            if not same(store.load(newest)[0], state(newest.step)):
                problems.append(f"step {newest.step} is not as written")
            left = [name for name in os.listdir(store.folder) if name.startswith((".tmp-", ".trash-"))]
            return problems + [f"left over: {name}" for name in left]
    except CheckpointError as error:
        return [f"unreadable: {error.message}"]


def kill_at_each_call(root: Path, *, saves: int = 4, recovery_every: int = 10) -> Counts:
    """A process that saves is killed before its first, second, ... call that changes the disk, until none is left.

    After every `recovery_every`-th of these the recovery is killed at each of its calls, too.
    """
    counts, begun, n = Counts("killed at each I/O call"), time.monotonic(), 0
    recoveries = 0
    while True:
        n += 1
        folder = root / f"kill-{n}"
        acknowledged, ended = _killed(folder, saves, n)
        if n % recovery_every == 0 and not ended and folder.exists():
            recoveries += _kill_recovery(folder, root / "again", acknowledged, counts)
        counts.add(recovered(folder, acknowledged))
        shutil.rmtree(folder, ignore_errors=True)
        if ended:
            break
    counts.note = f"{n - 1} in saving, {recoveries} in recovery"
    counts.seconds = time.monotonic() - begun
    return counts


def _killed(folder: Path, saves: int, n: int) -> tuple[int, bool]:
    """(the last step acknowledged, whether the process came to its end) of one that is killed at call `n`."""
    told, tell = os.pipe()

    def act() -> None:
        with Store(folder, disk=killed_at(n)) as store:
            for step in range(1, saves + 1):
                store.save(step, state(step))
                os.write(tell, step.to_bytes(4, "big"))

    child = forked(act)
    os.close(tell)
    acknowledged = _last(told)
    return acknowledged, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _kill_recovery(folder: Path, copy: Path, acknowledged: int, counts: Counts) -> int:
    m = 0
    while True:
        m += 1
        shutil.copytree(folder, copy)

        def act(m: int = m) -> None:
            if recovered(copy, acknowledged, killed_at(m)):
                os._exit(3)

        code = os.waitstatus_to_exitcode(os.waitpid(forked(act), 0)[1])
        if code not in (0, -signal.SIGKILL):
            counts.problems.append(f"a recovery ended with {code}")
        counts.add(recovered(copy, acknowledged))
        shutil.rmtree(copy)
        if code == 0:
            return m - 1


def power_losses(root: Path, *, states: int, saves: int = 12, seed: int = 0) -> Counts:
    """Crash states of a recorded run of saves: unsynced changes dropped, reordered, torn."""
    counts, begun = Counts("power loss"), time.monotonic()
    folder = root / "recorded"
    root.mkdir(parents=True, exist_ok=True)
    disk = RecordingDisk(root)
    with Store(folder, disk=disk) as store:
        for step in range(1, saves + 1):
            store.save(step, state(step), best=step == 3)
            disk.mark(step)
    for number, (marks, build) in enumerate(disk.states(seed)):
        if number == states:
            break
        place = root / "state"
        place.mkdir()
        build(place)
        counts.add(recovered(place / "recorded", max((m for m in marks if isinstance(m, int)), default=0)))
        shutil.rmtree(place)
    counts.seconds = time.monotonic() - begun
    return counts


def random_kills(root: Path, *, kills: int, seed: int = 0) -> Counts:
    """A process that saves without pause is killed (SIGKILL) at a random time; the next goes on where it ended."""
    counts, begun, rng = Counts("kill -9 at random"), time.monotonic(), random.Random(seed)
    acknowledged = written = 0
    for _ in range(kills):
        told, tell = os.pipe()

        def act(tell: int = tell) -> None:
            with Store(root / "random") as store:
                newest = store.newest()
                step = newest.step if newest is not None else 0
                while True:
                    step += 1
                    store.save(step, state(step))
                    os.write(tell, step.to_bytes(4, "big"))

        child = forked(act)
        os.close(tell)
        select.select([told], [], [], 30.0)  # from its first save on
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = _last(told)
        written += max(last - acknowledged, 0)
        acknowledged = max(acknowledged, last)
        counts.add(recovered(root / "random", acknowledged))
    counts.note = f"{written} saves"
    counts.seconds = time.monotonic() - begun
    return counts


def damage(root: Path, *, each: int, seed: int = 0) -> Counts:
    """Truncations and flipped bits, `each` in every file of the newest checkpoint; the one before must be used."""
    counts, begun, rng = Counts("truncated, or a bit flipped"), time.monotonic(), random.Random(seed)
    said: list[str] = []
    with Store(root / "damage", say=said.append) as store:
        store.save(1, state(1))
        newest = store.save(2, state(2), facts={"accuracy": 0.5}).path
        for name in sorted(os.listdir(newest)):
            good = (newest / name).read_bytes()
            for n in range(2 * each):
                (newest / name).write_bytes(good[: rng.randrange(len(good))] if n % 2 else _flipped(good, rng))
                said.clear()
                found = store.newest()
                problems = [] if found is not None and found.step == 1 else [f"{name}: damage was not noticed"]
                aside = store.folder / QUARANTINE / newest.name
                if not problems and (not aside.is_dir() or not said):
                    problems.append(f"{name}: not quarantined, or not told")
                counts.add(problems)
                if aside.is_dir():
                    os.rename(aside, newest)
                (newest / name).write_bytes(good)
        found = store.newest()
        if found is None or found.step != 2:
            counts.problems.append("the whole one was not accepted")
    counts.seconds = time.monotonic() - begun
    return counts


def _flipped(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def two_owners(root: Path, *, pairs: int) -> Counts:
    """Two processes take one folder at the same moment; a third comes while it is held, and must change nothing."""
    counts, begun, slowest = Counts("two owners"), time.monotonic(), 0.0
    for n in range(pairs):
        problems, seconds = _contest(root / f"owners-{n}")
        slowest = max(slowest, seconds)
        counts.add(problems)
    if slowest >= 1.0:
        counts.problems.append(f"one that lost took {slowest:.2f} s")
    counts.note = f"slowest to give up {slowest * 1e3:.0f} ms"
    counts.seconds = time.monotonic() - begun
    return counts


def _contest(folder: Path) -> tuple[list[str], float]:
    """What went wrong between three processes, and the seconds the third took to give up."""
    told, tell = os.pipe()
    hold, release = os.pipe()
    at = time.monotonic() + 0.02

    def race() -> None:
        os.close(release)
        time.sleep(max(at - time.monotonic(), 0.0))
        _tries(folder, tell, hold)

    children = [forked(race), forked(race)]
    os.close(hold)
    words = b""
    while len(words) < 2 and select.select([told], [], [], 10.0)[0]:
        words += os.read(told, 2)
    problems = [] if sorted(words) == sorted(b"wl") else [f"of two processes: {words!r}"]
    before, late = _seen(folder), time.monotonic()
    third = forked(lambda: _tries(folder, tell, -1))
    os.waitpid(third, 0)
    seconds = time.monotonic() - late
    if os.read(told, 1) != b"l":
        problems.append("a third one got the folder")
    if _seen(folder) != before:
        problems.append("one that lost changed something")
    os.close(release)
    for child in children:
        os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    return problems, seconds


def _tries(folder: Path, tell: int, hold: int) -> None:
    """Try to own a folder and tell: `w`(on) or `l`(ost); the winner keeps it until `hold` ends."""
    try:
        with Store(folder):
            os.write(tell, b"w")
            if hold >= 0:
                os.read(hold, 1)
    except InUseError:
        os.write(tell, b"l")


def _seen(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def calls_of_a_save(root: Path) -> int:
    """How many calls that change the disk one save makes, deletions of an older one counted."""
    disk = WatchedDisk()
    with Store(root / "calls", disk=disk) as store:
        for step in (1, 2):
            store.save(step, state(step))
        before = disk.calls
        store.save(3, state(3))
        return disk.calls - before


def forked(act: Callable[[], None]) -> int:
    """The process id of a child that runs `act` and ends; 0 is its exit status, 1 after an exception."""
    state(0)  # imports torch here, once, and not in every child
    child = os.fork()
    if child:
        return child
    gc.disable()  # a collection would copy every page the child shares with us
    try:
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _last(told: int) -> int:
    """The last number written to a pipe whose writers have ended."""
    data = b""
    while part := os.read(told, 65536):
        data += part
    os.close(told)
    whole = len(data) - len(data) % 4
    return int.from_bytes(data[whole - 4 : whole], "big") if whole else 0
