"""How a run stands at one moment: the figures that `watch` draws, computed from records alone.

Rates come from the last half minute, so that they show what goes on now; sums come from the whole run. Every figure
is a `Quantity` that says whether it was measured, estimated, or is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from upshift.records.ledger import Entry, Ledger
from upshift.records.measurement import PHASES
from upshift.records.quantity import Quantity, Record, unknown
from upshift.records.resources import Alarm, GpuSample, Resources, Sample
from upshift.records.run import Event, Run, Window
from upshift.report import words

#: Seconds over which speed and rates are taken; at least so many windows, as one may be a slow exception.
SPAN = 30.0
LEAST_WINDOWS = 5

#: The first windows hold compilation and cold caches: the time that is left is told after so many.
LEAST_FOR_FORECAST = 3

#: A sample is old when the next is overdue by so much, in periods and in seconds.
OLD_PERIODS, OLD_SECONDS = 3.0, 10.0


class Moment(NamedTuple):
    """What is known of a run when it is looked at."""

    run: Run
    recent: tuple[Window, ...] = ()
    """The last windows as written; empty: those of `run` are taken."""
    events: tuple[Event, ...] = ()
    """The last events; empty: those of `run`."""
    metrics: Event | None = None
    """The last evaluation."""
    resources: Resources | None = None
    ledger: Ledger | None = None
    elapsed: float | None = None
    """Seconds since the run began."""
    silent: float | None = None
    """Seconds since its log was last written."""
    share: float = 1.0
    """How much of the log has been read, 0..1; below 1 sums are of a part of the run."""


class GpuNow(Record, frozen=True):
    """One accelerator. Units: fraction, B, W, degC, Hz."""

    name: str
    utilisation: Quantity
    memory: Quantity
    memory_total: Quantity
    watts: Quantity
    temperature: Quantity
    clock: Quantity
    clock_most: Quantity
    throttled: tuple[str, ...] = ()


class Snapshot(Record, frozen=True):
    """A run as `watch` shows it. Units: s, steps/s, fraction, B, B/s, W, degC, Hz; counts have the unit 1."""

    run: str
    script: str
    arguments: tuple[str, ...]
    plan: str
    techniques: dict[str, dict[str, bool | int | float | str]]
    status: str
    exit_code: int | None
    elapsed: Quantity
    silent: float | None
    """Seconds since the log was last written; None: not known."""
    share: float
    """How much of the log these figures rest on, 0..1."""
    steps: int
    steps_planned: int | None
    speed: Quantity
    step: Quantity
    left: Quantity
    left_how: str
    loss: Quantity
    loss_step: int | None
    metrics: dict[str, float | None]
    metrics_step: int | None
    phases: dict[str, Quantity]
    """Shares of a step, over the same windows as `speed`."""
    evaluation: Quantity
    """Share of the run spent in evaluation, and in checkpoints."""
    checkpoint: Quantity
    sample_age: float | None
    """Seconds since the machine was last looked at; None: it never was."""
    sample_old: bool
    cores: float | None
    cpu: Quantity
    """Cores' worth of CPU time, and the same as a share of the cores that the run may use."""
    cpu_share: Quantity
    machine_share: Quantity
    memory: Quantity
    memory_limit: float | None
    memory_available: Quantity
    read: Quantity
    written: Quantity
    sent: Quantity
    received: Quantity
    swapped: Quantity
    disk_free: Quantity
    shm: Quantity
    processes: int | None
    threads: int | None
    watts: Quantity
    temperature: Quantity
    clock: Quantity
    clock_most: float | None
    gpus: tuple[GpuNow, ...]
    alarms: tuple[Alarm, ...]
    events: tuple[Event, ...]
    notes: tuple[str, ...]
    energy: Entry | None = None
    carbon: Entry | None = None
    cost: Entry | None = None
    currency: str = "USD"
    schema: int = 1


def snapshot(moment: Moment) -> Snapshot:
    """The figures of a moment. Pure: the same moment gives the same figures."""
    run, resources = moment.run, moment.resources
    near = _near(moment.recent or run.windows)
    speed = _speed(near)
    left, left_how = time_left(run, near, whole=moment.share >= 1)
    loss = next((item for item in reversed(moment.recent or run.windows) if words.finite(item.loss)), None)
    metrics = moment.metrics or next(
        (item for item in reversed(run.events) if item.kind == "metrics" and item.values), None
    )
    samples = _attempt(resources.samples if resources is not None else ())
    last = samples[-1] if samples else None
    # The last look may have come after the last process had ended.
    seen = next((item for item in reversed(samples) if item.processes), last)
    head = resources.head if resources is not None else None
    cores = head.cores if head is not None and words.finite(head.cores) and head.cores > 0 else None
    cpu = rate(samples, lambda item: item.cpu_seconds, "cores")
    machine = rate(samples, lambda item: item.machine_cpu_seconds, "cores")
    period = samples[-1].at - samples[-2].at if len(samples) > 1 else (head.period if head is not None else 1.0)
    age = max(moment.elapsed - last.at, 0.0) if last is not None and moment.elapsed is not None else None
    ledger = moment.ledger
    torn = run.torn_lines + (resources.torn_lines if resources is not None else 0)
    notes = [*(head.notes if head is not None else ())]
    if torn:
        notes.append(f"{torn:,} lines of the record could not be read")
    return Snapshot(
        run=run.id,
        script=run.script,
        arguments=run.arguments,
        plan=run.plan,
        techniques=run.techniques,
        status=run.status,
        exit_code=run.exit_code,
        elapsed=_measured(moment.elapsed if moment.elapsed is not None else run.seconds, "s"),
        silent=moment.silent,
        share=moment.share,
        steps=run.steps,
        steps_planned=run.steps_planned,
        speed=speed,
        step=_measured(1 / speed.or_else(1.0), "s", n=speed.n) if speed.or_else(0.0) > 0 else unknown("s"),
        left=left,
        left_how=left_how,
        loss=_measured(loss.loss, "", n=loss.n) if loss is not None else unknown(""),
        loss_step=loss.first + loss.n if loss is not None else None,
        metrics=dict(metrics.values) if metrics is not None else {},
        metrics_step=metrics.step if metrics is not None else None,
        phases=_phases(near),
        evaluation=_apart(run, moment.share, lambda item: item.evaluation),
        checkpoint=_apart(run, moment.share, lambda item: item.checkpoint),
        sample_age=age,
        sample_old=age is not None and run.status == "running" and age > OLD_PERIODS * max(period, 0.0) + OLD_SECONDS,
        cores=cores,
        cpu=cpu,
        cpu_share=_share(cpu, cores),
        machine_share=_share(machine, cores),
        memory=_measured(seen.memory if seen is not None else None, "B"),
        memory_limit=head.memory_limit if head is not None and words.finite(head.memory_limit) else None,
        memory_available=_measured(last.memory_available if last is not None else None, "B"),
        read=rate(samples, lambda item: item.read, "B/s"),
        written=rate(samples, lambda item: item.written, "B/s"),
        sent=rate(samples, lambda item: item.sent, "B/s"),
        received=rate(samples, lambda item: item.received, "B/s"),
        swapped=rate(samples, lambda item: item.swapped, "B/s"),
        disk_free=_measured(last.disk_free if last is not None else None, "B"),
        shm=_measured(last.shm if last is not None else None, "B"),
        processes=last.processes if last is not None else None,
        threads=last.threads if last is not None else None,
        watts=_watts(last, head.energy_basis if head is not None else "unknown"),
        temperature=_measured(last.temperature if last is not None else None, "degC"),
        clock=_measured(last.clock if last is not None else None, "Hz"),
        clock_most=head.clock_most if head is not None and words.finite(head.clock_most) else None,
        gpus=tuple(map(_gpu, last.gpus)) if last is not None else (),
        alarms=resources.alarms[-20:] if resources is not None else (),
        events=tuple(item for item in moment.events or run.events if item.kind != "metrics")[-20:],
        notes=tuple(notes),
        energy=ledger.energy if ledger is not None else None,
        carbon=ledger.carbon if ledger is not None else None,
        cost=ledger.cost if ledger is not None else None,
        currency=ledger.currency if ledger is not None else "USD",
    )


def time_left(run: Run, near: Sequence[Window], *, whole: bool = True) -> tuple[Quantity, str]:
    """Seconds that are left, and how that is known.

    Between the pace of the whole run and that of its last windows, evaluation and checkpoints included; the two are
    the bounds, so a run whose pace changes has a wide one. Nothing is told before the total is known.
    """
    if run.status not in ("running", "unknown"):
        return unknown("s"), "the run is over"
    if run.steps_planned is None:
        return unknown("s"), "how many steps it will make is not recorded"
    remaining = run.steps_planned - run.steps
    if remaining <= 0:
        return unknown("s"), "all planned steps are made"
    paces = [pace for pace in (_wall(run.windows), _wall(near)) if pace is not None]
    if len(run.windows) < LEAST_FOR_FORECAST or not paces:
        return unknown("s"), "too few steps so far"
    low, high = min(paces) * remaining, max(paces) * remaining
    over = "the whole run" if whole else "the part read so far"
    how = f"from the pace of {over} and of its last {sum(item.n for item in near):,} steps"
    return Quantity((low + high) / 2, "s", low, high, 0, "estimated"), how


def rate(samples: Sequence[Sample], of: Callable[[Sample], float | None], unit: str) -> Quantity:
    """How fast a counter rises, over the last `SPAN` seconds of the samples that know it.

    Unknown where fewer than two do, and where it fell, as only a counter that began anew does.
    """
    seen = [(item.at, value) for item in samples[-200:] if words.finite(value := of(item))]
    if len(seen) < 2:
        return unknown(unit)
    end, last = seen[-1]
    start, first = next(((at, value) for at, value in reversed(seen[:-1]) if end - at >= SPAN), seen[0])
    if end <= start or last < first:
        return unknown(unit)
    return _measured((last - first) / (end - start), unit, n=len([at for at, _ in seen if at >= start]))


def _near(windows: Sequence[Window]) -> list[Window]:
    """The last windows that can be timed, back to `SPAN` seconds of training."""
    found: list[Window] = []
    seconds = 0.0
    for item in reversed(windows):
        if item.n <= 0 or not words.finite(item.seconds) or item.seconds < 0:
            continue
        found.append(item)
        seconds += item.seconds
        if seconds >= SPAN and len(found) >= LEAST_WINDOWS:
            break
    return found[::-1]


def _speed(windows: Sequence[Window]) -> Quantity:
    steps, seconds = sum(item.n for item in windows), sum(item.seconds for item in windows)
    return _measured(steps / seconds, "steps/s", n=steps) if steps and seconds > 1e-12 else unknown("steps/s")


def _wall(windows: Sequence[Window]) -> float | None:
    """Seconds per step with all that stands between two steps."""
    good = [item for item in windows if item.n > 0 and words.finite(item.seconds)]
    steps = sum(item.n for item in good)
    seconds = sum(item.seconds + item.evaluation + item.checkpoint for item in good)
    return seconds / steps if steps and words.finite(seconds) and seconds > 0 else None


def _phases(windows: Sequence[Window]) -> dict[str, Quantity]:
    timed = [item for item in windows if item.phases]
    total, steps = sum(item.seconds for item in timed), sum(item.n for item in timed)
    if total <= 1e-12:
        return {}
    names = {name for item in timed for name in item.phases}
    sums = {name: sum(item.phases.get(name, 0.0) for item in timed) for name in names}
    order = [*(name for name in PHASES if name in sums), *sorted(names - set(PHASES))]
    return {name: _measured(sums[name] / total, "fraction", n=steps) for name in order}


def _apart(run: Run, share: float, of: Callable[[Window], float]) -> Quantity:
    """The part of a run that such work took; unknown while only a part of the log has been read."""
    whole = sum(item.seconds + item.evaluation + item.checkpoint for item in run.windows)
    if share < 1 or not words.finite(whole) or whole <= 1e-12:
        return unknown("fraction")
    return _measured(sum(of(item) for item in run.windows) / whole, "fraction", n=run.steps)


def _attempt(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples since the run last began: a run that goes on in the same folder counts from zero again."""
    for place in range(len(samples) - 1, 0, -1):
        if samples[place].at < samples[place - 1].at:
            return samples[place:]
    return samples


def _share(cores_used: Quantity, cores: float | None) -> Quantity:
    if cores is None or cores_used.value is None:
        return unknown("fraction")
    return _measured(cores_used.value / cores, "fraction", n=cores_used.n)


def _watts(last: Sample | None, basis: str) -> Quantity:
    if last is None or not words.finite(last.watts):
        return unknown("W")
    return Quantity(last.watts, "W", basis="measured" if basis == "measured" else "estimated")


def _gpu(gpu: GpuSample) -> GpuNow:
    return GpuNow(
        name=gpu.name,
        utilisation=_measured(gpu.utilisation, "fraction"),
        memory=_measured(gpu.memory, "B"),
        memory_total=_measured(gpu.memory_total, "B"),
        watts=_measured(gpu.watts, "W"),
        temperature=_measured(gpu.temperature, "degC"),
        clock=_measured(gpu.clock, "Hz"),
        clock_most=_measured(gpu.clock_most, "Hz"),
        throttled=gpu.throttled,
    )


def _measured(value: float | None, unit: str, n: int = 0) -> Quantity:
    return Quantity(value, unit, n=n) if words.finite(value) else unknown(unit)
