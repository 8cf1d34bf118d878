"""What the control group of this process has used, and what its limits leave. Both cgroup versions.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; cpu.stat of Documentation/scheduler/
sched-bwc.rst. The folders are looked up once: a process rarely changes its group.
"""

from __future__ import annotations

from pathlib import Path

from upshift.hardware.machine import NO_LIMIT, group_folders, small_text

#: Limit, usage and the part of the usage that the system takes back by itself (pages of files), per version.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


class Group:
    """The control group of this process with its ancestors."""

    def __init__(self, root: Path = Path("/")) -> None:
        unified, v1_cpu = group_folders(root, ""), group_folders(root, "cpu")
        self._memory = [
            (folder, names)
            for names, folders in ((_V2, unified), (_V1, group_folders(root, "memory")))
            for folder in folders
            if _number(folder / names[0]) is not None
        ]
        self._stats = [
            folder / "cpu.stat"
            for folder in (*unified, *v1_cpu)
            if {"throttled_usec", "throttled_time"} & _table(folder / "cpu.stat").keys()
        ]
        self._usage: Path | None = None
        quotas = [(quota, folder) for folder in (*unified, *v1_cpu) if (quota := _quota(folder)) is not None]
        #: CPU seconds that may be used per second; None: as many as there are.
        self.quota = min(quotas, default=(None, None))[0]
        if quotas:
            _, folder = min(quotas)
            if folder in unified:
                self._usage = folder / "cpu.stat"
            else:
                same = [item for item in group_folders(root, "cpuacct") if item.name == folder.name]
                self._usage = next(
                    (item / "cpuacct.usage" for item in (folder, *same) if (item / "cpuacct.usage").exists()), None
                )

    def memory_room(self) -> float | None:
        """Bytes that the limits leave; None where there is no limit. Pages of files are given back when needed."""
        rooms = []
        for folder, (limit_name, usage_name, given_back) in self._memory:
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is None or usage is None or limit >= NO_LIMIT:
                continue
            table = _table(folder / "memory.stat")
            rooms.append(max(limit - usage + sum(table.get(name, 0.0) for name in given_back), 0.0))
        return min(rooms, default=None)

    def throttled(self) -> float | None:
        """CPU seconds, over all cores, in which a quota has kept runnable processes waiting; None: nobody counts."""
        found = []
        for path in self._stats:
            table = _table(path)
            if "throttled_usec" in table:
                found.append(table["throttled_usec"] / 1e6)
            elif "throttled_time" in table:
                found.append(table["throttled_time"] / 1e9)
        return max(found, default=None)

    def cpu_seconds(self) -> float | None:
        """CPU time of the group that has the tightest quota; None where there is none, or it is not told."""
        if self._usage is None:
            return None
        if self._usage.name == "cpu.stat":
            used = _table(self._usage).get("usage_usec")
            return None if used is None else used / 1e6
        used = _number(self._usage)
        return None if used is None else used / 1e9


def _number(path: Path) -> float | None:
    text = small_text(path)
    return float(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, float]:
    pairs = (line.split() for line in small_text(path).splitlines())
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _quota(folder: Path) -> float | None:
    parts = small_text(folder / "cpu.max").split()
    if not parts:
        parts = [small_text(folder / "cpu.cfs_quota_us"), small_text(folder / "cpu.cfs_period_us")]
    if len(parts) == 2 and parts[0].isdecimal() and parts[1].isdecimal() and int(parts[1]) > 0 and int(parts[0]) > 0:
        return int(parts[0]) / int(parts[1])
    return None
