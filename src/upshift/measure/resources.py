"""What a process tree, its machine and its accelerators use, in one look. Each source fails for itself.

Figures that count (`cpu_seconds`, bytes, joules) are sums since the run began and never fall. Those of the whole
machine begin with this object, a fraction of a second later.

Sources: proc(5) for /proc/stat, meminfo, vmstat, net/dev and loadavg; where there is no /proc, psutil.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from upshift.hardware import machine
from upshift.hardware.watts import Watts, stated
from upshift.measure.cgroups import Group
from upshift.measure.counters import Rapl, Read
from upshift.measure.gpus import here
from upshift.measure.power import Estimate
from upshift.measure.sensors import Clock, Thermometer, usable_cpus
from upshift.measure.tree import Sums, Tree
from upshift.records.quantity import Basis
from upshift.records.resources import Head, Sample

#: A counter of energy that has not moved after so many seconds never will (virtual machines show such).
STANDS_STILL = 5.0

_Value = Callable[[], float | None]


class Looker:
    """Looks at the tree of `pid`, at the machine and at its accelerators.

    Args:
        folder: where the run is recorded; the free space of its disk is watched.
        period: seconds between two looks at first, for the head only.
        began: `time.monotonic()` when the run began; None: now.
        spent: what `pid` had used by then.
        watts: of a logical core, for the estimate where nothing counts energy.
        visible: CUDA_VISIBLE_DEVICES of the run; by default that of this process.
        root: of the filesystem that /proc and /sys are read from.
    """

    def __init__(
        self,
        pid: int,
        folder: Path,
        *,
        period: float = 1.0,
        began: float | None = None,
        spent: Sums | None = None,
        watts: Watts | None = None,
        visible: str | None = None,
        root: Path = Path("/"),
    ) -> None:
        self._pid, self._folder, self._period, self._root = pid, folder, period, root
        self._began = time.monotonic() if began is None else began
        self._tree = Tree(pid, root)
        self._spent = spent or Sums(0.0, None, None)
        self._notes: list[str] = []
        self._group = Group(root)
        self._cpus = usable_cpus()
        self._cores = min(float(len(self._cpus)), self._group.quota or math.inf)
        self._clock = Clock(self._cpus, self._cores, root)
        self._thermometer = Thermometer(root)
        if visible is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._gpus, notes = here(visible, root / "proc")
        self._notes += notes
        self._estimate = Estimate(watts or stated(), max(math.ceil(self._cores), 1))
        self._rapl = Rapl.here(root / "sys/class/powercap")
        self._rapl_read: Read | None = self._rapl.begin(pid) if self._rapl else None
        self._rapl_moved = False
        self._last: tuple[float, float] | None = None
        self._unknown: tuple[str, ...] = ()
        self._memory_limit = _known(lambda: float(machine.memory_limit(root)))
        self._shm_size = _known(lambda: sum(_space(root / "dev/shm")))
        self._clock_most = _known(self._clock.most)
        self._machine_cpu = _since(lambda: _machine_cpu(root, self._group, set(self._cpus)))
        self._sent = _since(lambda: _network(root)[1])
        self._received = _since(lambda: _network(root)[0])
        self._swapped = _since(lambda: _swapped(root))
        self._throttled = _since(self._group.throttled)

    def look(self) -> Sample:
        """One look, which takes some milliseconds. Never raises for what cannot be read."""
        at = time.monotonic() - self._began
        tree = self._tree.look()
        gone = not tree.processes
        cpu = max(tree.sums.cpu - self._spent.cpu, 0.0)
        gpus = self._gpus.look(tree.pids, at) if self._gpus else ()
        joules = self._joules(at, cpu, [gpu.joules for gpu in gpus])
        watts = None
        if joules is not None and self._last is not None and at > self._last[0]:
            watts = max(joules - self._last[1], 0.0) / (at - self._last[0])
        self._last = (at, joules) if joules is not None else None
        sample = Sample(
            at=at,
            cpu_seconds=cpu,
            machine_cpu_seconds=_known(self._machine_cpu),
            memory=tree.memory,
            memory_available=_known(lambda: _available(self._root, self._group)),
            read=_less(tree.sums.read, self._spent.read),
            written=_less(tree.sums.written, self._spent.written),
            sent=_known(self._sent),
            received=_known(self._received),
            swapped=_known(self._swapped),
            shm=_known(lambda: _space(self._root / "dev/shm")[0]),
            disk_free=_known(lambda: _space(self._folder)[1]),
            processes=tree.processes,
            threads=None if gone else tree.threads,
            load=_known(lambda: _load(self._root)),
            clock=_known(self._clock.hertz),
            temperature=_known(self._thermometer.celsius),
            watts=watts,
            joules=joules,
            throttled=_known(self._throttled),
            gpus=gpus,
        )
        if not gone:
            self._unknown = tuple(words for name, words in _WORDS.items() if getattr(sample, name) is None)
        return sample

    def head(self) -> Head:
        """What does not change; to be written again when it does (an accelerator is used for the first time)."""
        energy, basis = self._energy()
        notes = [*self._notes, *(self._gpus.notes if self._gpus else ())]
        if not self._tree.proportional:
            notes.append("memory is the resident size: pages that processes share are counted in each of them")
        if self._unknown:
            notes.append(f"not known here: {', '.join(self._unknown)}")
        return Head(
            pid=self._pid,
            period=self._period,
            cores=self._cores,
            memory_limit=self._memory_limit,
            shm_size=self._shm_size,
            clock_most=self._clock_most,
            energy=energy,
            energy_basis=basis,
            notes=tuple(notes),
            power_limits=self._gpus.power_limits if self._gpus is not None else (),
        )

    # -- energy --------------------------------------------------------------------------------------------------

    def _joules(self, at: float, cpu: float, gpus: list[float | None]) -> float | None:
        processor: float | None
        if self._rapl_read is not None:
            processor = self._rapl_read()
            self._rapl_moved = self._rapl_moved or processor is not None
            if not self._rapl_moved and at > STANDS_STILL:
                self._rapl = self._rapl_read = None
        if self._rapl_read is None:
            processor = self._estimate.joules(at, cpu)
        # A sum of some of them is not the energy of the run.
        if processor is None or None in gpus:
            return None
        return processor + sum(value for value in gpus if value is not None)

    def _energy(self) -> tuple[str, Basis]:
        """How the joules are known, in a sentence, and the basis of their weakest part."""
        gpus = self._gpus if self._gpus is not None and self._gpus.used else None
        if self._rapl is not None:
            basis: Basis = gpus.basis if gpus else "measured"
            parts = [gpus.what] if gpus else []
            return f"energy is {basis}: {'; '.join([*parts, self._rapl.what])}", basis
        processor = f"the processor from {self._estimate.what}"
        return f"energy is estimated: {'; '.join([gpus.what, processor] if gpus else [processor])}", "estimated"


#: What a person would miss, where a look did not find it.
_WORDS = {
    "memory": "memory", "memory_available": "memory available", "read": "disk I/O", "sent": "network",
    "disk_free": "free disk space", "clock": "clock of the processor", "temperature": "temperature of the processor",
}  # fmt: skip


def _since(count: _Value) -> _Value:
    """A counter of the machine made one that begins now, or with the first look it can be read at."""
    first = _known(count)

    def since() -> float | None:
        nonlocal first
        now = count()
        if first is None:
            first = now
        return None if now is None or first is None else max(now - first, 0.0)

    return since


def _known(source: _Value) -> float | None:
    """A source that fails tells nothing, and stops no other."""
    try:
        value = source()
        return value if value is None or math.isfinite(value) else None
    except Exception:
        return None


def _less(now: float | None, before: float | None) -> float | None:
    return None if now is None else max(now - (before or 0.0), 0.0)


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def _machine_cpu(root: Path, group: Group, cpus: set[int]) -> float | None:
    """CPU seconds of the container that has a quota, else of the cores that may be used, by whomever."""
    if group.quota is not None and (used := group.cpu_seconds()) is not None:
        return used
    try:
        lines = _text(root / "proc/stat").splitlines()
    except OSError:
        import psutil

        spent = psutil.cpu_times()
        return float(spent.user + spent.system)
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in cpus:
            # user, nice, system, irq, softirq; what guests took is in user already.
            ticks += sum(int(fields[place]) for place in (0, 1, 2, 5, 6))
    return ticks / os.sysconf("SC_CLK_TCK")


def _available(root: Path, group: Group) -> float | None:
    """Bytes that may still be taken: of the machine, or of the group where its limits leave less."""
    rooms = [group.memory_room()]
    try:
        for line in _text(root / "proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(float(line.split()[1]) * 1024.0)
    except OSError:
        import psutil

        rooms.append(float(psutil.virtual_memory().available))
    return min((room for room in rooms if room is not None), default=None)


def _network(root: Path) -> tuple[float, float]:
    """Bytes received and sent. Of real devices where there are any, else of all but the loopback."""
    try:
        lines = _text(root / "proc/net/dev").splitlines()[2:]
    except OSError:
        import psutil

        counters = psutil.net_io_counters(pernic=True)
        nics = [value for name, value in counters.items() if not name.startswith("lo")]
        return float(sum(nic.bytes_recv for nic in nics)), float(sum(nic.bytes_sent for nic in nics))
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        fields = rest.split()
        if name.strip() != "lo" and len(fields) >= 9:
            found[name.strip()] = (float(fields[0]), float(fields[8]))
    # A bridge and the card behind it would count the same bytes.
    real = [value for name, value in found.items() if (root / "sys/class/net" / name / "device").exists()]
    chosen = real or list(found.values())
    return sum(item[0] for item in chosen), sum(item[1] for item in chosen)


def _swapped(root: Path) -> float | None:
    try:
        table = dict(line.split() for line in _text(root / "proc/vmstat").splitlines() if line.startswith("pswp"))
        return (float(table["pswpin"]) + float(table["pswpout"])) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, KeyError):
        import psutil

        swap = psutil.swap_memory()
        return float(swap.sin + swap.sout)


def _load(root: Path) -> float | None:
    try:
        return float(_text(root / "proc/loadavg").split()[0])
    except OSError:
        return os.getloadavg()[0]


def _space(path: Path) -> tuple[float, float]:
    """Bytes used, and bytes free for this user."""
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_bavail * found.f_frsize
