"""CPU time of a process tree while it runs.

The system adds the time of an ended process to the parent that waited for it, so the sum over the living, each with
what it has waited for, is the time of the tree. Two kinds of process fall out of that sum: one whose parent ended
first, which is followed on its own from then on, and one that ended unwaited for (its parent ignores SIGCHLD), whose
time is lost. Not seen at all: a process that leaves the family and ends between two looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass
class _Seen:
    seconds: float
    parent: int


class TreeTime:
    """CPU time of `pid` and of all that descend from it. Look now and then: what is asked rarely is seen coarsely."""

    def __init__(self, pid: int) -> None:
        self._seen: dict[psutil.Process, _Seen] = {}
        self._kept = 0.0
        self._most = 0.0
        try:
            root = psutil.Process(pid)
        except psutil.Error:
            return
        self._seen[root] = _Seen(0.0, 0)

    def members(self) -> list[psutil.Process]:
        """Those of the tree that were alive at the last look."""
        return list(self._seen)

    def seconds(self) -> float:
        """User and system seconds so far, over all cores. Never falls."""
        family = {member.pid for member in self._seen}
        for head in [member for member, seen in self._seen.items() if seen.parent not in family]:
            try:
                for member in head.children(recursive=True):
                    self._seen.setdefault(member, _Seen(0.0, member.ppid()))
            except psutil.Error:
                continue
        for member in list(self._seen):
            try:
                if not member.is_running():
                    raise psutil.NoSuchProcess(member.pid)
                spent = member.cpu_times()
                waited = getattr(spent, "children_user", 0.0) + getattr(spent, "children_system", 0.0)
                self._seen[member] = _Seen(spent.user + spent.system + waited, member.ppid())
            except psutil.Error:
                gone = self._seen.pop(member)
                # Where the parent was there at the last look, it (or who waited for it) has its time by now.
                self._kept += gone.seconds if gone.parent not in family else 0.0
        self._most = max(self._most, self._kept + sum(seen.seconds for seen in self._seen.values()))
        return self._most
