"""What a run used of its machine over time: the fold of `resources.jsonl`, which is written beside the run.

Counters are sums since the run began, so that samples may be taken rarely, or thinned, without losing any of them.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from upshift.records.quantity import Basis, Record
from upshift.records.tail import Tail

FILE = "resources.jsonl"

#: Samples kept in the fold; of more, every second one is dropped.
MOST_SAMPLES = 4096
MOST_ALARMS = 1000


class GpuSample(Record, frozen=True):
    """One accelerator. Bytes, watts, degrees Celsius, Hz; `joules` since the run began; None: not known."""

    name: str = ""
    utilisation: float | None = None
    """Share of the time since the last look in which a kernel ran (0..1), as the driver says."""
    memory: float | None = None
    memory_total: float | None = None
    watts: float | None = None
    joules: float | None = None
    temperature: float | None = None
    clock: float | None = None
    clock_most: float | None = None
    throttled: tuple[str, ...] = ()
    """Why its clock is held down, in words; empty where it is not."""


class Sample(Record, frozen=True):
    """One look, `at` seconds since the run began. None: not known."""

    at: float
    cpu_seconds: float | None = None
    """CPU time of the process tree since the run began, loader workers included."""
    machine_cpu_seconds: float | None = None
    """CPU time of the whole machine (or container) since the run began, other work included."""
    memory: float | None = None
    """Bytes of the process tree: proportional set size where the system tells it, else resident."""
    memory_available: float | None = None
    """Bytes that may still be taken: of the container where it has a limit."""
    read: float | None = None
    """Bytes read from disks by the process tree since the run began."""
    written: float | None = None
    sent: float | None = None
    """Bytes sent over the network by the whole machine since the run began."""
    received: float | None = None
    swapped: float | None = None
    """Bytes swapped in and out by the whole machine since the run began."""
    shm: float | None = None
    """Bytes used in /dev/shm."""
    disk_free: float | None = None
    """Bytes free where the run is recorded."""
    processes: int | None = None
    threads: int | None = None
    load: float | None = None
    """Processes and threads of the whole machine that run or wait for a core or a disk, mean of a minute."""
    clock: float | None = None
    """Hz of the processor, mean of its cores."""
    temperature: float | None = None
    watts: float | None = None
    """Of what `joules` counts, since the last look."""
    joules: float | None = None
    """Energy since the run began, of all that `Head.energy` names."""
    throttled: float | None = None
    """Seconds in which the quota of the control group held the processes up, since the run began."""
    gpus: tuple[GpuSample, ...] = ()


class PowerLimit(Record, frozen=True):
    """What the driver lets one accelerator draw, in watts: `now`, by `default`, and the range that may be set."""

    name: str
    now: float | None = None
    default: float | None = None
    least: float | None = None
    most: float | None = None


class Head(Record, frozen=True):
    """What does not change while a run goes on."""

    pid: int = 0
    period: float = 1.0
    """Seconds between two looks at first; later they are rarer."""
    cores: float | None = None
    """Cores that the run may use: affinity and quota."""
    memory_limit: float | None = None
    shm_size: float | None = None
    """Bytes that /dev/shm may hold."""
    clock_most: float | None = None
    energy: str = ""
    """How `joules` are known, in a sentence; empty: they are not."""
    energy_basis: Basis = "unknown"
    notes: tuple[str, ...] = ()
    """What could not be read here, and why."""
    power_limits: tuple[PowerLimit, ...] = ()
    """Of the accelerators of the run, as they were when each was first used."""


class Alarm(Record, frozen=True):
    """Something that costs time or will end the run, in words, with its cause where the anatomy shows it."""

    at: float
    name: str
    text: str


class Resources(Record, frozen=True):
    """All samples of a run in the order of time."""

    head: Head = Head()
    samples: tuple[Sample, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    overhead_seconds: float | None = None
    """CPU time that looking itself took."""
    torn_lines: int = 0


def read(folder: Path) -> Resources | None:
    """The resources recorded in a run's folder; None where none were. Lines that cannot be read are counted."""
    tail, found = Tail(folder / FILE), _Folded()
    try:
        while lines := tail.read():
            for line in lines:
                found.add(line)
        for line in tail.last():
            found.add(line)
    except OSError:
        return None
    return found.resources()


class _Folded:
    """What has been read so far. Of very many samples every second one is dropped, but never the last."""

    def __init__(self) -> None:
        self.head = Head()
        self.samples: list[Sample] = []
        self.newest: Sample | None = None
        self.alarms: list[Alarm] = []
        self.overhead: float | None = None
        self.torn = 0
        self._stride, self._seen = 1, 0

    def add(self, line: bytes) -> None:
        """Add one line."""
        try:
            item = msgspec.json.decode(line)
            kind = item.pop("kind")
            if kind == "head":
                self.head = msgspec.convert(item, Head)
            elif kind == "sample":
                self._sample(msgspec.convert(item, Sample))
            elif kind == "alarm" and len(self.alarms) < MOST_ALARMS:
                self.alarms.append(msgspec.convert(item, Alarm))
            elif kind == "end":
                self.overhead = float(item["overhead_seconds"])
        except (
            msgspec.MsgspecError,
            ArithmeticError,
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            RecursionError,
        ):
            self.torn += 1

    def _sample(self, sample: Sample) -> None:
        self._seen += 1
        self.newest = sample
        if self._seen % self._stride == 0:
            self.samples.append(sample)
            self.newest = None
        if len(self.samples) > 2 * MOST_SAMPLES:
            self.samples, self._stride = self.samples[1::2], self._stride * 2

    def resources(self) -> Resources:
        """All of it. The newest sample holds the sums, so it is among the samples."""
        last = (self.newest,) if self.newest is not None else ()
        return Resources(self.head, (*self.samples, *last), tuple(self.alarms), self.overhead, self.torn)
