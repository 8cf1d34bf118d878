"""estimate(): what a training would need on catalogued hardware; see `estimate`."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from upshift.advise import devices, experience, memory
from upshift.advise.assessing import Wanted, assess
from upshift.advise.choice import choose, options
from upshift.api.diagnosis import DiagnoseOptions, _peaks, diagnose
from upshift.api.target import Say, Target
from upshift.errors import RecordError, UsageError
from upshift.hardware import catalog, machine, prices
from upshift.hardware.device import device_name
from upshift.hardware.rates import Rates
from upshift.hardware.rates import rates as read_rates
from upshift.records import Measurement, Quantity
from upshift.records.estimate import DeviceEstimate, DeviceFigures, Error, Estimate, OfferFigures
from upshift.records.quantity import estimated, unknown

#: Below this the memory of a process is mostly libraries, which no estimate is about.
LEAST_COMPARED = 512 * 2**20

_METHODS = (
    "memory: parameters, buffers and optimizer state are counted; what a step holds was seen in a real step, tensor by "
    "tensor, and what grows with the samples is scaled",
    "step: each operation's time is scaled by the rooflines of both devices; data and host time stay",
    "energy: time by the device's power, from idle to what its maker states; the machine around it is not counted",
)


@dataclass(frozen=True)
class EstimateOptions:
    """What to estimate for.

    `devices`: names of the catalogue, all where none is given. `batch`: samples of a pass. `budget` in the currency of
    the offers, `deadline` in seconds. `price`, `region`, `pue`: as written with the options of these names.
    """

    devices: tuple[str, ...] = ()
    batch: int | None = None
    precision: str = memory.AS_IS
    steps: int | None = None
    epochs: float | None = None
    budget: float | None = None
    deadline: float | None = None
    region: str | None = None
    price: str | None = None
    pue: str | None = None
    on_premises: bool = False
    measure: bool = False
    seconds: float = 20.0
    patience: float = 600.0
    allow_remote_writes: bool = False
    remember: Path | None = None
    """Where errors of estimates are kept; None: the usual place."""


def estimate(target: Target, options: EstimateOptions | None = None, say: Say = lambda text: None) -> Estimate:
    """Watch the training for some seconds as `diagnose` does, then predict it on other hardware.

    Raises:
        UsageError: an option that cannot be, or a device that is not in the catalogue: said before anything runs.
        NoTrainingError, ScriptFailedError: as `diagnose`.
    """
    wanted = options or EstimateOptions()
    _check(wanted)
    known = catalog.devices(catalog.own_files())
    chosen = devices.chosen(wanted.devices, known)
    rates = read_rates(wanted.price, wanted.region, wanted.pue)
    rent = {} if wanted.on_premises else _offers(rates, chosen, wanted.price is not None, say)
    seen = _watch(target, wanted, say)
    found = predict(seen, wanted, chosen, rent, rates, _probed(seen, say), known)
    notes = list(found.notes)
    if seen.work is None:
        notes.append("no step was seen operation by operation (too few steps, or compiled): --seconds 60 sees more")
    if wanted.on_premises:
        notes.append("no clouds: the data may not leave the house")
    compared: tuple[Error, ...] = ()
    if wanted.measure:
        say("measuring what was estimated")
        again, note = _again(target, wanted, seen, say)
        compared = compare(found.here, again, known_as=target.known_as, same_batch=not note)
        notes += [note] if note else []
        if not experience.append(compared, wanted.remember):
            notes.append("how far off this estimate was could not be remembered: its file cannot be written")
    told = experience.sentence(experience.read(wanted.remember), found.here.device.name)
    return msgspec.structs.replace(
        found, script=target.known_as, arguments=target.arguments, compared=compared, experience=told,
        notes=tuple(notes),
    )  # fmt: skip


def predict(
    seen: Measurement,
    wanted: EstimateOptions,
    chosen: Sequence[DeviceFigures],
    rent: Mapping[str, Sequence[OfferFigures]],
    rates: Rates,
    peaks: Any = None,
    known: Mapping[str, catalog.Device] | None = None,
) -> Estimate:
    """The estimate that follows from a measurement; nothing is run.

    Args:
        chosen: devices to estimate for. rent: device -> machines for rent. peaks: of the probe, where there are any.
        known: the catalogue, to look up the device at hand.
    """
    here, source = _here(seen, peaks, known or {}, rates)
    steps, how = steps_of(seen, wanted)
    asked = Wanted(
        batch=wanted.batch, precision=wanted.precision, steps=steps,
        grams=rates.intensity.grams if rates.intensity is not None else None, pue=rates.pue,
    )  # fmt: skip
    own = assess(seen, here, here, asked, () if rates.price is None else (devices.priced(rates.price),))
    all_found = [assess(seen, source if item.kind != "cpu" else here, item, asked, rent.get(item.name, ()))
                 for item in chosen]  # fmt: skip
    ways = [way for found in all_found for way in options(found, rent.get(found.device.name, ()), steps, seen)]
    picked = choose(ways, wanted.budget, wanted.deadline)
    advice = tuple(_advice(all_found, picked, wanted, steps))
    currencies = {offer.currency for offers in rent.values() for offer in offers}
    return Estimate(
        script=seen.script, arguments=seen.arguments, created=time.strftime("%Y-%m-%d %H:%M:%S"),
        here=own, devices=tuple(_sorted(all_found)), batch=wanted.batch or (seen.work.batch if seen.work else None),
        precision=wanted.precision, steps=steps, steps_how=how, budget=wanted.budget, deadline=wanted.deadline,
        currency=currencies.pop() if len(currencies) == 1 else "USD", choices=picked, advice=advice, methods=_METHODS,
    )  # fmt: skip


def _offers(rates: Rates, chosen: Sequence[DeviceFigures], given: bool, say: Say) -> dict[str, list[OfferFigures]]:
    """Machines for rent; a price the person gave stands in their place."""
    if given and rates.price is not None:
        return {item.name: [devices.priced(rates.price)] for item in chosen}
    return devices.offers(prices.known(say=say))


def _check(wanted: EstimateOptions) -> None:
    if wanted.steps is not None and wanted.epochs is not None:
        raise UsageError("--steps and --epochs say the same in two ways.", remedy="Give one of them.")
    if wanted.precision not in memory.PRECISIONS:
        raise UsageError(f"{wanted.precision!r} is no precision.", remedy=f"Known: {', '.join(memory.PRECISIONS[1:])}.")
    positive = {"--batch": wanted.batch, "--steps": wanted.steps, "--epochs": wanted.epochs, "--budget": wanted.budget,
                "--deadline": wanted.deadline}  # fmt: skip
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be more than zero.", remedy=f"Correct {name}, or leave it out.")


def _watch(target: Target, wanted: EstimateOptions, say: Say) -> Measurement:
    found = diagnose(
        target,
        DiagnoseOptions(
            seconds=wanted.seconds, patience=wanted.patience, allow_remote_writes=wanted.allow_remote_writes,
            extra={"work": True},
        ),
        say,
    )  # fmt: skip
    return found.measurement


def _probed(seen: Measurement, say: Say) -> Any:
    try:
        return _peaks(seen.facts.device, say)
    except (subprocess.TimeoutExpired, RecordError, OSError):
        return None


def _here(seen: Measurement, peaks: Any, known: Mapping[str, catalog.Device],
          rates: Rates) -> tuple[DeviceFigures, DeviceFigures]:  # fmt: skip
    """The device at hand as it was measured, and as what other devices are compared to.

    A GPU of the catalogue is compared by its stated figures: they err alike on both sides.
    """
    name = device_name(seen.facts.device)
    if seen.facts.device.startswith("cpu"):
        cores = machine.usable_cores()
        watts = (cores * rates.watts.idle, cores * rates.watts.busy)
        here = devices.at_hand(seen, peaks, name, float(machine.memory_limit()), watts)
        return here, here
    entry = catalog.find(name, known)
    stated = devices.figures(*entry) if entry is not None else None
    here = devices.at_hand(seen, peaks, name, None, None, stated)
    return here, stated if stated is not None else here


def steps_of(seen: Measurement, wanted: EstimateOptions) -> tuple[Quantity, str]:
    """How many steps the training makes, and how that is known; unknown where nothing says it."""
    scale = 1.0
    if wanted.batch is not None and seen.work is not None and seen.work.batch:
        scale = wanted.batch / seen.work.batch
    if wanted.steps is not None:
        return estimated(float(wanted.steps), "steps"), "as given"
    if wanted.epochs is not None:
        samples = next((item.samples for item in seen.facts.loaders if item.training and item.samples), None)
        each = seen.anatomy.samples.value
        if not samples or not each:
            return unknown("steps"), "the samples of an epoch are not known: give --steps"
        steps = wanted.epochs * samples / (each * scale)
        return estimated(math.ceil(steps), "steps"), f"{wanted.epochs:g} epochs of {samples:,} samples"
    if seen.facts.steps_total:
        how = "read off the script" + ("" if scale == 1.0 else ", for the same number of samples")
        return estimated(math.ceil(seen.facts.steps_total / scale), "steps"), how
    return unknown("steps"), "nothing says how many steps it makes: give --steps or --epochs"


def _sorted(found: Sequence[DeviceEstimate]) -> list[DeviceEstimate]:
    """Those that fit first, the cheapest (where that is known) and then the fastest before the others."""
    infinite = float("inf")

    def key(item: DeviceEstimate) -> tuple[int, float, float]:
        cheapest = min((cost.on_demand.or_else(infinite) for cost in item.costs), default=infinite)
        return {True: 0, None: 1, False: 2}[item.fits], cheapest, item.total.or_else(item.step.or_else(infinite))

    return sorted(found, key=key)


def _advice(found: Sequence[DeviceEstimate], picked: Sequence[Any], wanted: EstimateOptions,
            steps: Quantity) -> list[str]:  # fmt: skip
    limits = wanted.budget is not None or wanted.deadline is not None
    lines = []
    if found and all(item.fits is False for item in found):
        lines.append("it fits none of these devices as it is; what would make it fit stands with each")
    if limits and steps.value is None:
        lines.append("budget and deadline need the number of steps: give --steps or --epochs")
    elif limits and not picked:
        lines.append("nothing in the catalogue can be held to the budget and the deadline: too little is known of it")
    elif limits and not picked[0].within:
        lines.append("nothing in the catalogue does this; the nearest is shown")
    if any(item.order_of_magnitude for item in found):
        lines.append(
            "step times on another kind of device are orders of magnitude: run upshift estimate --measure on one for "
            "an hour before renting many"
        )
    return lines


def _again(target: Target, wanted: EstimateOptions, seen: Measurement, say: Say) -> tuple[Measurement, str]:
    """A second measurement, at the samples asked for where that can be set from outside; a note where it cannot."""
    different = wanted.batch is not None and seen.work is not None and wanted.batch != seen.work.batch
    if not different:
        return _watch(target, wanted, say), ""
    if target.job:
        other = Target(target.name, (*target.arguments, "--set", f"global_batch={wanted.batch}"), target.module)
        return _watch(other, wanted, say), ""
    note = "a script's batch cannot be set from outside: what was measured again is its own, so it is not compared"
    return _watch(target, wanted, say), note


def compare(predicted: DeviceEstimate, measured: Measurement, *, known_as: str, same_batch: bool = True,
            ) -> tuple[Error, ...]:  # fmt: skip
    """How far the estimate for the machine at hand was off. Empty where the two are not about the same."""
    if not same_batch:
        return ()
    found = []
    when, device = time.strftime("%Y-%m-%d %H:%M:%S"), predicted.device.name
    step = measured.anatomy.step.value
    if predicted.step.value and step:
        found.append(Error(when, "step", device, known_as, predicted.step.value, step, "s"))
    work = measured.work
    held = None if work is None else work.allocator_peak if work.device == "cuda" else work.process_peak
    if predicted.memory.value and held and held >= LEAST_COMPARED:
        # The allocator counts tensors only: what context and fragmentation add is not in its figure.
        parts = predicted.parts
        beside = sum(parts[name].or_else(0.0) for name in ("context", "allocator") if name in parts)
        found.append(Error(when, "memory", device, known_as, predicted.memory.value - beside, held, "B"))
    return tuple(found)
