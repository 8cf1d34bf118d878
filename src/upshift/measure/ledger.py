"""The books of a run: hours, energy, carbon and money, from its log, its samples and the rates of its machine.

Pure: records go in, a record comes out. What was not seen stays unknown, and each figure says how it is known.

    energy  the joules counted beside the run; where nothing counted them, cores x watts x time, as an interval
    carbon  energy x the yearly average of the grid, so always an estimate
    cost    wall time x price an hour

A folder may hold several starts of one job: times, energy and work are then those of all of them together.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from upshift.hardware.rates import Rates
from upshift.measure.consumed import carbon, energy, on_cpu
from upshift.measure.lost import Spot, lost
from upshift.measure.totals import Starts, Sum, by_start, entry, good, summed
from upshift.records.ledger import Entry, Ledger
from upshift.records.quantity import Basis, Quantity, unknown
from upshift.records.resources import GpuSample, Resources, Sample
from upshift.records.run import Run
from upshift.records.trial import TuneReport
from upshift.units import seconds as in_words

#: More CPU time than the cores have, by this factor, is a mistake of one of the two figures.
OVERSHOOT = 1.05

__all__ = ["Spot", "ledger"]


def ledger(
    run: Run,
    resources: Resources | None,
    rates: Rates,
    tuning: TuneReport | None = None,
    *,
    epochs: float | None = None,
    spot: Spot | None = None,
) -> Ledger:
    """What `run` used and cost.

    Args:
        resources: what was sampled beside it; None: nothing was.
        rates: price an hour, carbon intensity, PUE, watts of a core.
        tuning: the search that found its plan.
        epochs: passes over the data made so far; None: as the log says.
        spot: the machine may be taken away: what that is expected to cost, where the log shows no interruption.

    Returns:
        In the units of `Ledger`. `level` of an interval means nothing here: its ends are bounds of the rates.
    """
    starts = by_start(resources.samples if resources is not None else ())
    time = _time(run, starts)
    devices, named = _devices(run, starts)
    joules = energy(run, resources, starts, time.value.value, rates)
    cost = _cost(time, devices, rates)
    cpu = summed(starts, lambda sample: sample.cpu_seconds)
    return Ledger(
        run=run.id,
        seconds=time,
        device_hours=_hours(time, devices, named),
        cpu_hours=_cpu_hours(cpu),
        energy=joules,
        carbon=carbon(joules, rates),
        cost=cost,
        cost_per_epoch=_per_epoch(cost, run.epochs if epochs is None else Quantity(epochs, "epochs")),
        lost=lost(run, time.value.value, spot),
        memory=_peak(starts, lambda sample: sample.memory, "the process tree", _NO_SAMPLES),
        gpu_memory=_peak(starts, _fullest, "the fullest GPU, other programs on it included", _NO_GPU),
        cpu_utilisation=_cpu_utilisation(cpu, resources),
        gpu_utilisation=_gpu_utilisation(starts),
        currency=rates.currency,
        tuning=_tuning(run, tuning, devices, rates),
        cost_to_target=_to_target(run, devices, rates),
    )


_NO_SAMPLES = "nothing was sampled beside the run"
_NO_GPU = "no GPU was seen, or its driver does not say"


# -- time ---------------------------------------------------------------------------------------------------------


def _time(run: Run, starts: Starts) -> Entry:
    seconds = run.seconds
    if run.status in ("running", "unknown") and starts and len(starts) > len(run.earlier):
        seconds = max(seconds or 0.0, starts[-1][-1].at)
    if seconds is None and not run.earlier:
        return Entry(unknown("s"), "the log does not say how long it took")
    words = "wall time"
    if run.earlier:
        words += f" of {len(run.earlier) + 1} starts together"
    if run.status == "running":
        words += ", so far"
    elif run.status == "unknown":
        words += ", until the last sign of it"
    return entry(sum((*run.earlier, seconds or 0.0)), "s", words, n=len(run.earlier) + 1)


def _devices(run: Run, starts: Starts) -> tuple[int | None, str]:
    """GPUs of the run, 1 for a machine without; None: not known."""
    gpus = max((len(sample.gpus) for samples in starts for sample in samples), default=0)
    if gpus:
        return gpus, f"{gpus} GPU{'s' if gpus > 1 else ''} the run could use"
    if starts or on_cpu(run):
        return 1, "1 machine without a GPU for the run"
    return None, "how many devices it used is not recorded"


def _hours(time: Entry, devices: int | None, named: str) -> Entry:
    if devices is None or time.value.value is None:
        return Entry(unknown("h"), named if devices is None else time.how)
    return entry(devices * time.value.value / 3600.0, "h", f"{time.how} x {named}", n=time.value.n)


def _cpu_hours(cpu: Sum | None) -> Entry:
    if cpu is None:
        return Entry(unknown("h"), _NO_SAMPLES)
    how = f"CPU time of the process tree in {in_words(cpu.covered)} of wall time"
    return entry(cpu.value / 3600.0, "h", how, n=cpu.n)


# -- money --------------------------------------------------------------------------------------------------------


def _money(seconds: float | None, what: str, devices: int | None, rates: Rates) -> Entry:
    """The price of so much time; `what` names it: `wall time`."""
    price = rates.price
    if price is None:
        return Entry(unknown(rates.currency), "no price is given")
    if seconds is None:
        return Entry(unknown(price.currency), "the time is not known")
    if price.per == "device" and devices is None:
        return Entry(unknown(price.currency), "how many devices it used is not recorded")
    count = devices if price.per == "device" and devices is not None else 1
    how = f"{what} x {price.what}{f' x {count}' if price.per == 'device' else ''}"
    basis: Basis = "measured" if price.given else "estimated"
    return entry(price.per_hour * count * seconds / 3600.0, price.currency, how, basis=basis, n=1)


def _cost(time: Entry, devices: int | None, rates: Rates) -> Entry:
    return _money(time.value.value, "wall time", devices, rates)


def _per_epoch(cost: Entry, epochs: Quantity | None) -> Entry:
    quantity, made = cost.value, epochs.value if epochs is not None else None
    if quantity.value is None:
        return cost
    if epochs is None or made is None or not good(made) or made == 0:
        return Entry(unknown(quantity.unit), "the record does not say how many epochs were made")
    basis: Basis = "estimated" if "estimated" in (quantity.basis, epochs.basis) else quantity.basis
    about = "about " if epochs.basis == "estimated" else ""
    how = f"{cost.how} / {about}{made:.4g} epochs, start and evaluation included"
    return entry(quantity.value / made, quantity.unit, how, basis=basis, n=quantity.n)


def _tuning(run: Run, tuning: TuneReport | None, devices: int | None, rates: Rates) -> Entry | None:
    if tuning is not None:
        return _money(tuning.seconds, "wall time of the search", devices, rates)
    if run.plan:
        return Entry(unknown(rates.currency), "the search that found the plan is not recorded here")
    return None


def _to_target(run: Run, devices: int | None, rates: Rates) -> Entry | None:
    """None where no start tells of a target that was reached."""
    place = next((i for i, event in enumerate(run.events) if event.kind == "target"), None)
    if place is None:
        return None
    return _money(_since_first(run, place), "wall time to the target", devices, rates)


def _since_first(run: Run, place: int) -> float:
    """Seconds from the first start to an event; the starts between it and the last are those whose time falls."""
    after = run.events[place:]
    falls = sum(b.at < a.at for a, b in pairwise(after))
    return sum(run.earlier[: max(len(run.earlier) - falls, 0)]) + after[0].at


# -- memory and utilisation ---------------------------------------------------------------------------------------


def _fullest(sample: Sample) -> float | None:
    return max((gpu.memory for gpu in sample.gpus if gpu.memory is not None), default=None)


def _peak(starts: Starts, read: Callable[[Sample], float | None], what: str, without: str) -> Entry:
    """The highest reading. A peak between two looks is not seen."""
    known = [found for samples in starts for sample in samples if good(found := read(sample))]
    if not known:
        return Entry(unknown("B"), without)
    how = f"{what}, the highest of {len(known):,} looks; a peak between two of them is not seen"
    return entry(max(known), "B", how, n=len(known))


def _cpu_utilisation(cpu: Sum | None, resources: Resources | None) -> Entry:
    cores = resources.head.cores if resources is not None else None
    if cpu is None or not good(cores) or cores == 0 or cpu.covered <= 0.0:
        return Entry(unknown("1"), _NO_SAMPLES if cpu is None else "the cores of the run are not known")
    share = cpu.value / (cores * cpu.covered)
    if share > OVERSHOOT:
        return Entry(unknown("1"), f"more CPU time was counted than {cores:g} cores have")
    return entry(min(share, 1.0), "1", f"CPU time of the process tree / ({cores:g} cores x wall time)", n=cpu.n)


def _gpu_utilisation(starts: Starts) -> Entry:
    """The mean over time and GPUs: a sample speaks for the time since the last one."""
    weight, total, n = 0.0, 0.0, 0
    for samples in starts:
        before = 0.0
        for sample in samples:
            for share in (_share(gpu) for gpu in sample.gpus):
                if share is not None:
                    total, weight, n = total + share * (sample.at - before), weight + sample.at - before, n + 1
            before = sample.at
    if weight <= 0.0:
        return Entry(unknown("1"), _NO_GPU)
    return entry(
        total / weight, "1", "share of the time in which a kernel ran, by the driver: not how full it was", n=n
    )


def _share(gpu: GpuSample) -> float | None:
    found = gpu.utilisation
    return found if found is not None and 0.0 <= found <= 1.0 else None
