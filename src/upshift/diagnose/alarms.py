"""What the samples of a run give cause to say while it goes on: each alarm is a function, each speaks once.

Pure: samples and windows in, words out. Recent means the last minute, or the last samples where they are rarer. The
thresholds are judgements, each with its reason; none is a claim about how much time would be won.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

from upshift.diagnose import lately
from upshift.diagnose.slopes import rising
from upshift.records.measurement import PHASE_TITLES
from upshift.records.resources import Alarm, GpuSample, Head, Sample
from upshift.records.run import Window
from upshift.units import binary, percent, seconds, si

#: An accelerator that a kernel runs on for less than half of the time waits more than it works.
IDLE_GPU = 0.5
#: Less than a fifth of the step in one place does not explain a half-idle accelerator.
CAUSE = 0.2
#: Share of recent samples in which a reason must be named.
MOSTLY = 0.5
#: A power limit costs next to nothing while the clock stays above this share: large GPUs always run into theirs.
POWER_LIMITED = 0.8
#: A busy GPU without a reason to be slow keeps its clock well above this share of the highest.
LOW_GPU_CLOCK = 0.7
#: All cores busy with wide vectors may run at half of the highest clock of one core; below that something holds them.
LOW_CPU_CLOCK = 0.45
#: Cores are busy from here on.
BUSY = 0.8
#: Growth less than this share of what is left is no trend worth a word.
LEAST_GROWTH = 0.02
#: Nobody is warned of what is further away than this many times the time watched, or than a day.
FORESIGHT, MOST_AHEAD = 12.0, 86400.0
#: Memory left, as a share of the limit, below which the next allocation may be the last.
LAST_MEMORY = 0.03
#: Checkpoints for which there should be room: time enough to react.
CHECKPOINTS = 5
#: Seconds ahead from which a disk that fills without checkpoints is told.
DISK_AHEAD = 3600.0
#: Bytes per second in and out of swap: what is only moved out once and left there stays below.
SWAPPING = 1 << 20
#: Share of the cores' time for which a quota may hold processes up unnoticed.
HELD_UP = 0.05
#: Threads per core from which some are likely to be of no use, and threads per core that wait in fact.
THREADS_A_CORE, WAITING_A_CORE = 4.0, 1.0
#: Workers that pass batches on through shared memory die when it is full.
SHM_FULL = 0.9


def alarms(samples: Sequence[Sample], head: Head, windows: Sequence[Window] = ()) -> list[Alarm]:
    """All that the samples so far give cause to say, in the order of `RULES`, at the time of the last sample.

    Args:
        samples: in the order of time, from one start of the run.
        windows: of the same start; their phases name causes. None known: causes stay open.
    """
    if not samples:
        return []
    at = samples[-1].at
    found = []
    for name, rule in RULES.items():
        text = rule(samples, head, windows)
        if text:
            found.append(Alarm(at=at, name=name, text=text))
    return found


# -- accelerators ---------------------------------------------------------------------------------------------------


def starved_accelerator(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """Kernels run for less than half of the time, and the anatomy shows what training waits for."""
    recent = lately.recent(samples)
    busy = lately.mean(gpu.utilisation for sample in recent for gpu in sample.gpus)
    if busy is None or busy >= IDLE_GPU or not lately.settled(samples):
        return ""
    shares = _shares([window for window in windows if window.at >= recent[0].at])
    if not shares:
        return ""
    cause, share = max(shares.items(), key=lambda item: item[1])
    if share < CAUSE:
        return ""
    many = len(recent[-1].gpus) > 1
    who = "the accelerators are" if many else "the accelerator is"
    return f"{who} busy {percent(busy)} of the time: training spends {percent(share)} of it {_CAUSES[cause]}"


#: What holds an accelerator up, by phase. Forward and backward are the times of starting kernels, and say nothing.
_CAUSES = {
    "data": f"{PHASE_TITLES['data']} (more loader workers, or a cache; `upshift diagnose` shows which line is slow)",
    "other": "in Python outside the model (`upshift diagnose` shows the lines)",
    "optimizer": "in the optimizer's host code (a fused or compiled step starts fewer kernels)",
    "sync": "waiting for values it reads back (losses and metrics read less often)",
    "h2d": "copying to the device (pinned memory, copies that do not wait)",
    "checkpoint": "writing checkpoints (rarer, or in the background)",
}


def throttling(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """The clock of an accelerator is held down by heat, power or the board."""
    for recent in _devices(lately.recent(samples)):
        named = [reason for gpu in recent for reason in gpu.throttled]
        share = _clock_share(recent)
        for reason in dict.fromkeys(named):
            if named.count(reason) < MOSTLY * len(recent) or reason == _CHOSEN:
                continue
            if reason == _POWER and (share is None or share >= POWER_LIMITED):
                continue
            return f"{recent[-1].name} is slowed down: {reason}{_clock_text(recent)}{_heat_text(recent)}"
    return ""


#: In the words of `measure.gpus`.
_POWER, _CHOSEN = "power limit", "its clock was set by a person"


def low_clock(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """A busy device runs far below its highest clock, and nothing but a setting explains it."""
    recent = lately.recent(samples)
    if not lately.settled(samples):
        return ""
    for device in _devices(recent):
        busy, share = lately.mean(gpu.utilisation for gpu in device), _clock_share(device)
        forced = any(reason != _CHOSEN for gpu in device for reason in gpu.throttled)
        if busy is not None and busy >= BUSY and share is not None and share < LOW_GPU_CLOCK and not forced:
            return f"{device[-1].name} is busy but its clock is low{_clock_text(device)}: nvidia-smi -rgc frees it"
    clock, used = lately.mean(sample.clock for sample in recent), _cores_used(recent)
    if clock is None or not head.clock_most or used is None or not head.cores:
        return ""
    if used >= BUSY * head.cores and clock < LOW_CPU_CLOCK * head.clock_most:
        return (
            f"the processor is busy but runs at {si(clock, 'Hz')} of {si(head.clock_most, 'Hz')}: "
            "look at its power profile (powersave?) and its cooling"
        )
    return ""


# -- memory ---------------------------------------------------------------------------------------------------------


def memory_grows(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """Host memory grows steadily towards its limit."""
    left = samples[-1].memory_available
    return _grows(lately.watched(samples), lambda sample: sample.memory, left, "memory")


def gpu_memory_grows(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """The memory of an accelerator grows steadily towards its size."""
    watched = lately.watched(samples)
    for place, gpu in enumerate(samples[-1].gpus):
        if gpu.memory is None or gpu.memory_total is None:
            continue

        def memory(sample: Sample, place: int = place) -> float | None:
            return sample.gpus[place].memory if place < len(sample.gpus) else None

        if text := _grows(watched, memory, gpu.memory_total - gpu.memory, f"memory of {gpu.name}"):
            return text
    return ""


def memory_low(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """Next to no host memory is left."""
    left, limit = samples[-1].memory_available, head.memory_limit
    if left is None or not limit or left >= LAST_MEMORY * limit:
        return ""
    used = samples[-1].memory
    held = f"; this run holds {binary(used)}" if used is not None else ""
    return f"{binary(left)} of {binary(limit)} of memory are left{held}"


def swapping(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """The machine moves memory to and from a disk all the time."""
    rate = lately.rate(lately.recent(samples), lambda sample: sample.swapped)
    if rate is None or rate < SWAPPING:
        return ""
    return f"the machine swaps {binary(rate)} a second: it has too little memory for what runs on it"


def shm_full(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """/dev/shm, through which loader workers pass batches on, is nearly full."""
    used, size = samples[-1].shm, head.shm_size
    if used is None or not size or used < SHM_FULL * size:
        return ""
    return (
        f"/dev/shm holds {binary(used)} of {binary(size)}: loader workers die when it is full "
        "(in a container: --shm-size or --ipc=host; else fewer workers or less prefetching)"
    )


# -- disk -----------------------------------------------------------------------------------------------------------


def disk_full(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """The disk has no room for the next checkpoints, or fills up within the hour."""
    free = samples[-1].disk_free
    if free is None:
        return ""
    saves = _saves(windows)
    drops = [_around(samples, at, lambda sample: -(sample.disk_free or math.nan)) for at in saves]
    sizes = [_around(samples, at, lambda sample: sample.written) for at in saves]
    if known := [size for size in sizes if size is not None and size > 0.0]:
        size = median(known)
        # A save is written beside the one before it, which is removed after.
        if len(known) >= 2 and free < size:
            return f"{binary(free)} are free on the disk of this run, and a checkpoint takes about {binary(size)}"
    if dropped := [drop for drop in drops if drop is not None]:
        each = fmean(dropped)
        if len(dropped) >= 2 and each > 0.0 and free < CHECKPOINTS * each:
            room = int(free / each)
            every = (saves[-1] - saves[0]) / (len(saves) - 1)
            return (
                f"the disk of this run has room for {room} more checkpoint{'' if room == 1 else 's'} "
                f"({binary(free)} free, about {binary(each)} each): full in about {seconds(max(room, 1) * every)}"
            )
    slope = rising(
        [(sample.at, -sample.disk_free) for sample in lately.watched(samples) if sample.disk_free is not None]
    )
    if slope is not None and free / slope.value < DISK_AHEAD:
        return (
            f"the disk of this run is full in about {seconds(free / slope.value)} at this rate "
            f"({binary(free)} free, {binary(60.0 * slope.value)} less each minute)"
        )
    return ""


def _saves(windows: Sequence[Window]) -> list[float]:
    """When checkpoints were written, in seconds; one that lasts over several windows counts once, at its end."""
    found: list[float] = []
    before = False
    for window in windows:
        saved = window.checkpoint > 0.0
        if saved and before:
            found[-1] = window.at
        elif saved:
            found.append(window.at)
        before = saved
    return found


def _around(samples: Sequence[Sample], at: float, read: Callable[[Sample], float | None]) -> float | None:
    """How much a counter grew from a look before `at` to one after it: two looks apart, as their clocks differ."""
    before = [sample for sample in samples if sample.at <= at]
    after = [sample for sample in samples if sample.at > at]
    if len(before) < 3 or len(after) < 2:
        return None
    first, second = read(before[-3]), read(after[1])
    if first is None or second is None or math.isnan(first) or math.isnan(second):
        return None
    return second - first


# -- processor ------------------------------------------------------------------------------------------------------


def held_up(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """The quota of the control group holds the processes up."""
    rate = lately.rate(lately.recent(samples), lambda sample: sample.throttled)
    if rate is None or not head.cores or rate < HELD_UP * head.cores:
        return ""
    threads = samples[-1].threads
    some = f" (it has {threads} threads)" if threads else ""
    return (
        f"the CPU quota of the container, {head.cores:g} cores, holds the run up for {seconds(60.0 * rate)} of "
        f"CPU time each minute{some}: no more threads and workers than that, or a larger quota"
    )


def too_many_threads(samples: Sequence[Sample], head: Head, windows: Sequence[Window]) -> str:
    """Many more threads than cores, all cores busy, and threads of this run waiting for one."""
    recent = lately.recent(samples)
    threads, cores = samples[-1].threads, head.cores
    used, load = _cores_used(recent), lately.mean(sample.load for sample in recent)
    if not threads or not cores or used is None or load is None or not lately.settled(samples):
        return ""
    machine = lately.rate(recent, lambda sample: sample.machine_cpu_seconds)
    # What others run is at most their part of the load.
    own = load - max((machine if machine is not None else used) - used, 0.0)
    if threads < THREADS_A_CORE * cores or used < BUSY * cores or own < (1.0 + WAITING_A_CORE) * cores:
        return ""
    return (
        f"the run has {threads} threads on {cores:g} cores, and about {own - cores:.0f} of them wait for a core at "
        "any time: fewer loader workers, or OMP_NUM_THREADS set to the cores divided by the processes"
    )


# -- shared ---------------------------------------------------------------------------------------------------------

Rule = Callable[[Sequence[Sample], Head, Sequence[Window]], str]

RULES: dict[str, Rule] = {
    "memory_low": memory_low,
    "memory_grows": memory_grows,
    "gpu_memory_grows": gpu_memory_grows,
    "disk_full": disk_full,
    "shm_full": shm_full,
    "swapping": swapping,
    "throttling": throttling,
    "starved_accelerator": starved_accelerator,
    "low_clock": low_clock,
    "held_up": held_up,
    "too_many_threads": too_many_threads,
}


def _grows(watched: Sequence[Sample], read: Callable[[Sample], float | None], left: float | None, what: str) -> str:
    if not watched or left is None:
        return ""
    points = [(sample.at, value) for sample in watched if (value := read(sample)) is not None]
    slope = rising(points)
    if slope is None:
        return ""
    lasted = points[-1][0] - points[0][0]
    ahead = left / slope.value
    if slope.value * lasted < LEAST_GROWTH * left or ahead > min(FORESIGHT * lasted, MOST_AHEAD):
        return ""
    low, high = left / slope.high, left / slope.low
    return (
        f"{what} grows by {binary(60.0 * slope.value)} a minute: out of memory in about {seconds(ahead)} at this slope "
        f"({seconds(low)} to {seconds(high)}); {binary(max(left, 0.0))} are left"
    )


def _cores_used(samples: Sequence[Sample]) -> float | None:
    return lately.rate(samples, lambda sample: sample.cpu_seconds)


def _devices(samples: Sequence[Sample]) -> list[list[GpuSample]]:
    """The samples of each accelerator that has enough of them."""
    most = max((len(sample.gpus) for sample in samples), default=0)
    found = [[sample.gpus[place] for sample in samples if place < len(sample.gpus)] for place in range(most)]
    return [device for device in found if len(device) >= lately.LEAST_SAMPLES]


def _clock_share(device: Sequence[GpuSample]) -> float | None:
    return lately.mean(gpu.clock / gpu.clock_most for gpu in device if gpu.clock is not None and gpu.clock_most)


def _clock_text(device: Sequence[GpuSample]) -> str:
    clock, most = device[-1].clock, device[-1].clock_most
    return f" ({si(clock, 'Hz')} of {si(most, 'Hz')})" if clock is not None and most else ""


def _heat_text(device: Sequence[GpuSample]) -> str:
    heat = device[-1].temperature
    return f", at {heat:.0f} degrees Celsius" if heat is not None else ""


def _shares(windows: Sequence[Window]) -> dict[str, float]:
    """Share of the time of these windows in each phase that can hold an accelerator up."""
    total = math.fsum(window.seconds + window.evaluation + window.checkpoint for window in windows)
    if total <= 0.0:
        return {}
    spent = {name: math.fsum(window.phases.get(name, 0.0) for window in windows) for name in _CAUSES}
    spent["checkpoint"] = math.fsum(window.checkpoint for window in windows)
    if any(window.phases for window in windows) and not spent["other"]:
        # The rest of a step, where the log does not name it.
        named = math.fsum(value for window in windows for value in window.phases.values())
        spent["other"] = max(math.fsum(w.seconds for w in windows if w.phases) - named, 0.0)
    return {name: value / total for name, value in spent.items()}
