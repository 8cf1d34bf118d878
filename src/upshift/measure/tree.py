"""A process tree in one pass: CPU time, disk I/O, memory, processes and threads.

Linux adds the CPU time and the I/O of an ended process to the parent that waited for it (proc(5), proc_pid_io(5)), so
the sum over the living, each with what it has waited for, is that of the tree. Two kinds of process fall out of that
sum: one whose parent ended first, which is followed on its own from then on, and one that ended unwaited for (its
parent ignores SIGCHLD), whose sums are lost. Not seen at all: one that leaves the family and ends between two looks.
Only the tree itself is read, through `/proc/PID/task/TID/children`: a machine may run thousands of other processes.
Where that file or /proc is missing, psutil is asked.

Memory is the proportional set size (pages that n processes share count 1/n each). Reading it walks the page tables,
which takes longer the more memory there is, so it is read as often as a fixed share of time allows; in between, the
growth of what is not shared is added.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

#: Share of one core that reading the proportional set size may take; ten times that while processes come and go.
MEMORY_SHARE = 1e-3

_READ = 1 << 16


class Sums(NamedTuple):
    """Since the processes began: CPU seconds, bytes read from and written to disks (None: not told)."""

    cpu: float
    read: float | None
    written: float | None


class Look(NamedTuple):
    """One look at a tree; `memory` in bytes, None where no process is left."""

    sums: Sums
    memory: float | None
    processes: int
    threads: int
    pids: tuple[int, ...]


@dataclass(slots=True)
class _Member:
    began: float
    parent: int
    cpu: float
    threads: int
    resident: float
    shared: float
    read: float | None = None
    written: float | None = None
    ended: bool = False
    """Not yet waited for by its parent: its sums stand, its memory is gone."""
    offset: float | None = None
    """Proportional set size less what is not shared, at the last reading of the former."""

    @property
    def private(self) -> float:
        return max(self.resident - self.shared, 0.0)


class Tree:
    """`pid` and all that descend from it. Look now and then: what is asked rarely is seen coarsely.

    Args:
        root: of the filesystem that holds `proc`, so that recorded trees can be read.
    """

    def __init__(self, pid: int, root: Path = Path("/")) -> None:
        self._proc = str(root / "proc")
        self._plain = os.path.exists(f"{self._proc}/{pid}/stat")
        self._lists = os.path.exists(f"{self._proc}/{pid}/task/{pid}/children")
        self._pages = os.sysconf("SC_PAGE_SIZE") if self._plain else 1
        self._ticks = os.sysconf("SC_CLK_TCK") if self._plain else 1
        self._members: dict[int, _Member] = {}
        self._kept = [0.0, 0.0, 0.0]
        self._most: list[float | None] = [0.0, None, None]
        self._due = self._last_read = self._cost = 0.0
        self.proportional = True
        """Whether the system told proportional sizes at the last look; else resident ones were taken."""
        root_process = self._process(pid)
        if root_process is not None:
            self._members[pid] = root_process

    @property
    def pids(self) -> tuple[int, ...]:
        """Those of the tree that were there at the last look."""
        return tuple(self._members)

    def look(self) -> Look:
        """The tree as it is now."""
        sums, changed = self._spent()
        living = [member for member in self._members.values() if not member.ended]
        threads = sum(member.threads for member in living)
        return Look(sums, self._memory(changed), len(living), threads, self.pids)

    def spent(self) -> Sums:
        """CPU time and I/O so far, without a look at the memory. Never falls."""
        return self._spent()[0]

    def _spent(self) -> tuple[Sums, bool]:
        """The sums, and whether processes have come or gone."""
        family = set(self._members)
        self._find()
        changed = set(self._members) != family
        for pid, before in list(self._members.items()):
            now = self._process(pid)
            if now is None or now.began != before.began:
                del self._members[pid]
                changed = True
                # Where the parent was there at the last look, it (or who waited for it) has these sums by now.
                if before.parent not in family:
                    for place, value in enumerate((before.cpu, before.read, before.written)):
                        self._kept[place] += value or 0.0
                continue
            now.offset = before.offset
            if now.read is None:
                now.read, now.written = before.read, before.written
            self._members[pid] = now
        living = self._members.values()
        sums: list[list[float | None]] = [
            [m.cpu for m in living],
            [m.read for m in living],
            [m.written for m in living],
        ]
        for place, values in enumerate(sums):
            known = [value for value in values if value is not None]
            if known:
                self._most[place] = max(self._most[place] or 0.0, self._kept[place] + sum(known))
        cpu, read, written = self._most
        return Sums(cpu or 0.0, read, written), changed

    # -- processes -----------------------------------------------------------------------------------------------

    def _find(self) -> None:
        waiting = list(self._members)
        while waiting:
            for child in self._children(waiting.pop()):
                if child not in self._members and (found := self._process(child)) is not None:
                    self._members[child] = found
                    waiting.append(child)

    def _children(self, pid: int) -> list[int]:
        if not self._lists:
            return _children_by_psutil(pid)
        found: list[int] = []
        try:
            for thread in os.listdir(f"{self._proc}/{pid}/task"):
                found += map(int, _bytes(f"{self._proc}/{pid}/task/{thread}/children").split())
        except (OSError, ValueError):
            pass  # it or a thread of it has ended meanwhile
        return found

    def _process(self, pid: int) -> _Member | None:
        if not self._plain:
            return _process_by_psutil(pid)
        folder = f"{self._proc}/{pid}"
        try:
            # The name stands in brackets and may hold anything, brackets too.
            fields = _bytes(f"{folder}/stat").rpartition(b")")[2].split()
            pages = _bytes(f"{folder}/statm").split()
            member = _Member(
                began=float(fields[19]),
                parent=int(fields[1]),
                cpu=sum(map(int, fields[11:15])) / self._ticks,
                threads=int(fields[17]),
                resident=float(int(pages[1]) * self._pages),
                shared=float(int(pages[2]) * self._pages),
                ended=fields[0] in (b"Z", b"X"),
            )
        except (OSError, ValueError, IndexError):
            return None
        try:
            lines = dict(line.split(b": ") for line in _bytes(f"{folder}/io").splitlines())
            member.read, member.written = float(lines[b"read_bytes"]), float(lines[b"write_bytes"])
        except (OSError, ValueError, KeyError):
            pass
        return member

    # -- memory --------------------------------------------------------------------------------------------------

    def _memory(self, changed: bool) -> float | None:
        living = {pid: member for pid, member in self._members.items() if not member.ended}
        if not living:
            return None
        now = time.monotonic()
        if changed:
            self._due = min(self._due, self._last_read + 0.1 * self._cost / MEMORY_SHARE)
        if now >= self._due:
            began = time.thread_time()
            self._read_proportional(living)
            self._cost = time.thread_time() - began
            self._last_read, self._due = now, now + self._cost / MEMORY_SHARE
        if not self.proportional:
            return sum(member.resident for member in living.values())
        # Of a process that is new, only what is not shared counts until its turn comes.
        return sum(max(member.private + (member.offset or 0.0), 0.0) for member in living.values())

    def _read_proportional(self, living: dict[int, _Member]) -> None:
        told = False
        for pid, member in living.items():
            size = self._proportional_of(pid)
            told = told or size is not None
            member.offset = (member.resident if size is None else size) - member.private
        self.proportional = told

    def _proportional_of(self, pid: int) -> float | None:
        if not self._plain:
            return None
        try:
            for line in _bytes(f"{self._proc}/{pid}/smaps_rollup").splitlines():
                if line.startswith(b"Pss:"):
                    return float(line.split()[1]) * 1024.0
        except (OSError, ValueError, IndexError):
            pass
        return None


def _bytes(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _READ)
    finally:
        os.close(fd)


def _children_by_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def _process_by_psutil(pid: int) -> _Member | None:
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            spent, memory = process.cpu_times(), process.memory_info()
            waited = getattr(spent, "children_user", 0.0) + getattr(spent, "children_system", 0.0)
            member = _Member(
                began=process.create_time(),
                parent=process.ppid(),
                cpu=spent.user + spent.system + waited,
                threads=process.num_threads(),
                resident=float(memory.rss),
                shared=0.0,
            )
        if hasattr(process, "io_counters"):
            counters = process.io_counters()
            member.read, member.written = float(counters.read_bytes), float(counters.write_bytes)
    except psutil.Error:
        return None
    return member
