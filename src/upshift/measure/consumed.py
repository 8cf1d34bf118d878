"""Energy and carbon of a run: counted joules, or cores x watts x time where nothing counted them."""

from __future__ import annotations

import re

from upshift.hardware.rates import Rates
from upshift.measure.totals import Starts, Sum, entry, good, summed
from upshift.records.ledger import Entry
from upshift.records.quantity import Basis, unknown
from upshift.records.resources import Resources, Sample
from upshift.records.run import Run
from upshift.units import seconds as in_words

JOULES_PER_KWH = 3.6e6

#: Samples that cover less of the run than this do not speak for the whole of it.
COVERED = 0.98


def energy(run: Run, resources: Resources | None, starts: Starts, seconds: float | None, rates: Rates) -> Entry:
    """Joules, by the building where its PUE is given."""
    found = _counted(resources, starts, seconds, rates) if resources is not None else None
    found = found or _by_watts(run, resources, starts, seconds, rates)
    quantity = found.value
    if quantity.value is None:
        return found
    if rates.pue is None:
        return Entry(quantity, f"{found.how}; what the building adds (PUE) is not counted")
    scaled = [
        value * rates.pue if value is not None else None for value in (quantity.value, quantity.low, quantity.high)
    ]
    how = f"{found.how}; x PUE {rates.pue:g}{', ' + rates.pue_source if rates.pue_source else ''}"
    # A factor that a person states for a building is no measurement of this run.
    basis: Basis = quantity.basis if rates.pue == 1.0 else "estimated"
    return entry(scaled[0], "J", how, basis=basis, n=quantity.n, low=scaled[1], high=scaled[2])


def _counted(resources: Resources, starts: Starts, seconds: float | None, rates: Rates) -> Entry | None:
    """From the joules of the samples; None where there are none to speak of."""
    total = summed(starts, lambda sample: sample.joules)
    if total is None or total.value <= 0.0 or total.covered <= 0.0:
        return None
    basis, how = resources.head.energy_basis, resources.head.energy
    if basis == "unknown":
        basis, how = "estimated", how or "how the joules were read is not recorded"
    value, low, high = total.value, None, None
    if basis == "estimated":
        low, high = _range(resources, starts, total, rates)
    if seconds is not None and total.covered < COVERED * seconds:
        scale = seconds / total.covered
        how = f"{how}; counted in {in_words(total.covered)} of {in_words(seconds)}, the rest at the same mean power"
        low = low if low is not None else value
        value, basis, high = value * scale, "estimated", high * scale if high is not None else None
    return entry(value, "J", how, basis=basis, n=total.n, low=low, high=high)


def _range(resources: Resources, starts: Starts, total: Sum, rates: Rates) -> tuple[float | None, float | None]:
    """What the watts of a core allow, all cores idle and all busy; GPUs that were counted stay as they are.

    It is the range of the method and not its error: the watts themselves are an assumption. (None, None) where the
    estimate was made with other watts or cores than are known here.
    """
    cores = resources.head.cores
    gpus = summed(starts, _gpu_joules)
    if not good(cores) or gpus is None:
        return None, None
    low = gpus.value + cores * rates.watts.idle * total.covered
    high = gpus.value + cores * rates.watts.busy * total.covered
    return (low, high) if low * 0.98 <= total.value <= high * 1.02 else (None, None)


def _gpu_joules(sample: Sample) -> float | None:
    """Joules of all GPUs; 0 where there is none, None where one of them does not say."""
    known = [gpu.joules for gpu in sample.gpus if gpu.joules is not None]
    return sum(known) if len(known) == len(sample.gpus) else None


def _by_watts(run: Run, resources: Resources | None, starts: Starts, seconds: float | None, rates: Rates) -> Entry:
    """From time alone: the watts of the cores, idle and busy. Not for a GPU."""
    if any(sample.gpus for samples in starts for sample in samples) or not (starts or on_cpu(run)):
        return Entry(unknown("J"), "no energy was counted, and that of a GPU does not follow from time")
    cores = resources.head.cores if resources is not None else None
    if cores is None and (found := re.match(r"(\d{1,5}) usable", run.environment.get("cores", ""))):
        cores = float(found[1])
    if not good(cores) or seconds is None:
        return Entry(unknown("J"), "no energy was counted, and the cores or the time of the run are not known")
    idle, busy = rates.watts.idle, rates.watts.busy
    low, high = cores * idle * seconds, cores * busy * seconds
    each = f"{cores:g} cores at {idle:g} to {busy:g} W each ({rates.watts.source})"
    cpu = summed(starts, lambda sample: sample.cpu_seconds)
    if cpu is not None and cpu.covered >= COVERED * seconds:
        value, how = low + (busy - idle) * cpu.value, f"CPU time and wall time: {each}"
    else:
        value, how = (low + high) / 2.0, f"wall time alone, the middle of what is possible: {each}"
    return entry(min(value, high), "J", how, basis="estimated", low=low, high=high)


def carbon(energy: Entry, rates: Rates) -> Entry:
    """Grams of CO2 equivalent: energy x the yearly average of the grid, so always an estimate."""
    if rates.intensity is None:
        return Entry(unknown("g"), "no region is given, so the carbon of its electricity is not known")
    quantity = energy.value
    if quantity.value is None:
        return Entry(unknown("g"), "its energy is not known")
    grams = [
        value / JOULES_PER_KWH * rates.intensity.grams if value is not None else None
        for value in (quantity.value, quantity.low, quantity.high)
    ]
    how = f"energy ({quantity.basis}) x {rates.intensity.what}"
    return entry(grams[0], "g", how, basis="estimated", n=quantity.n, low=grams[1], high=grams[2])


def on_cpu(run: Run) -> bool:
    """Whether the log says that the run trained on the processor."""
    return run.environment.get("device", "").lower().startswith("cpu")
