"""One device for one training: does it fit, how long, how much energy and money. Wires the predictions together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from upshift.advise import memory, remedies, steptime
from upshift.checkpoint.interval import INTERRUPTED_EVERY, seconds_between
from upshift.records.estimate import Cost, DeviceEstimate, DeviceFigures, OfferFigures, Remedy
from upshift.records.measurement import Measurement
from upshift.records.quantity import Quantity, estimated, unknown
from upshift.units import seconds as in_words

#: Where between idle and full power a device in training stands, and its idle power where nobody states it: assumed.
LOAD, IDLE = 0.7, 0.15

#: Seconds until a machine that was taken away is replaced, and bytes per second a save is written with: assumed.
REPLACED, WRITTEN = 180.0, 5e8

#: USD for a kilowatt-hour, value and range: assumed; what a device that is bought costs to run.
ELECTRICITY = (0.2, 0.08, 0.4)

#: Joules.
KILOWATT_HOUR = 3.6e6


UNKNOWN_STEPS = unknown("steps")


@dataclass(frozen=True)
class Wanted:
    """What is to be trained: samples of a pass (None: as seen), precision, steps, and what energy brings with it.

    `grams`: CO2 equivalent of a kilowatt-hour, None: not known; `pue`: None: not counted.
    """

    batch: int | None = None
    precision: str = memory.AS_IS
    steps: Quantity = UNKNOWN_STEPS
    grams: float | None = None
    pue: float | None = None


def assess(seen: Measurement, source: DeviceFigures, target: DeviceFigures, wanted: Wanted,
           offers: Sequence[OfferFigures] = ()) -> DeviceEstimate:  # fmt: skip
    """What the training would need on `target`, from what was seen of it on `source`.

    Every figure whose basis is missing is unknown, and a note says why.
    """
    accelerator = target.kind != "cpu"
    autocast = seen.facts.autocast
    notes = []
    held = memory.predict(seen.work, batch=wanted.batch, precision=wanted.precision, autocast=autocast,
                          accelerator=accelerator)  # fmt: skip
    if held.why:
        notes.append(f"memory is unknown: {held.why}")
    elif target.memory is None:
        notes.append(f"the memory of {target.name} is unknown, so whether it fits is, too")
    step = steptime.scale(seen, source, target, batch=wanted.batch, precision=wanted.precision)
    if step.why:
        notes.append(f"the step is unknown: {step.why}")
    if target.kind in ("tpu", "accelerator"):
        notes.append("needs its maker's build of PyTorch, and the script changed for it")
    fits = _fits(held.total, target.memory)
    total = plus(times(step.step, wanted.steps, "s"), seen.anatomy.startup)
    energy = times(total, power(target), "J")
    most = memory.largest_batch(seen.work, target.memory, precision=wanted.precision, autocast=autocast,
                                accelerator=accelerator)  # fmt: skip
    costs = tuple(cost(offer, total, seen) for offer in offers)
    return DeviceEstimate(
        device=target,
        memory=held.total,
        parts=held.parts,
        fits=fits,
        largest_batch=most,
        step=step.step,
        order_of_magnitude=step.order_of_magnitude,
        total=total,
        energy=energy,
        carbon=carbon(energy, wanted),
        costs=costs,
        remedies=_remedies(seen, target, wanted) if fits is False or _near(held.total, target.memory) else (),
        break_even=break_even(target, offers),
        how=step.how or step.why,
        step_parts=step.parts,
        notes=tuple(notes),
    )


def _fits(needed: Quantity, there: float | None) -> bool | None:
    if needed.value is None or there is None:
        return None
    return needed.value <= memory.HEADROOM * there


def _near(needed: Quantity, there: float | None) -> bool:
    """Whether only the high end of the interval is too much."""
    return there is not None and needed.high is not None and needed.high > there


def _remedies(seen: Measurement, target: DeviceFigures, wanted: Wanted) -> tuple[Remedy, ...]:
    if seen.work is None or target.memory is None:
        return ()
    return remedies.remedies(
        seen.work, seen.facts, target.memory, batch=wanted.batch, precision=wanted.precision,
        bf16=bool(target.flops.get("bfloat16")), accelerator=target.kind != "cpu",
    )  # fmt: skip


def power(device: DeviceFigures) -> Quantity:
    """Watts of a device in training: between idle and full power; unknown where its power is not known."""
    if device.watts is None:
        return unknown("W")
    idle = device.watts_idle if device.watts_idle is not None else IDLE * device.watts
    return estimated(idle + LOAD * (device.watts - idle), "W", min(idle, device.watts), device.watts)


def carbon(energy: Quantity, wanted: Wanted) -> Quantity:
    """Grams of CO2 equivalent; unknown without a grid's intensity."""
    if energy.value is None or wanted.grams is None:
        return unknown("gCO2e")
    factor = wanted.grams / KILOWATT_HOUR * (wanted.pue if wanted.pue is not None else 1.0)
    return _scaled(energy, factor, "gCO2e")


def cost(offer: OfferFigures, total: Quantity, seen: Measurement) -> Cost:
    """What a training of `total` seconds on one device costs there: its share of the machine's price.

    On a spot machine interruptions come on average every `INTERRUPTED_EVERY` seconds (assumed); each loses half of the
    time between saves, start-up and `REPLACED`, and saving takes its share (Young 1974, Daly 2006).
    """
    money = unknown(offer.currency)
    on_demand = _scaled(total, offer.hour / 3600 / offer.count, offer.currency) if offer.hour is not None else money
    if offer.spot is None or total.value is None:
        return Cost(offer, total, on_demand, money, unknown("interruptions"), unknown("s"))
    stall, note = _save(seen)
    between = max(seconds_between(stall), 60.0)
    lost_each = between / 2 + seen.anatomy.startup.or_else(0.0) + REPLACED
    share = stall / between + lost_each / INTERRUPTED_EVERY
    lost = _scaled(total, share, "s")
    spot = _scaled(total, (1 + share) * offer.spot / 3600 / offer.count, offer.currency)
    return Cost(
        offer, total, on_demand, spot, _scaled(total, 1 / INTERRUPTED_EVERY, "interruptions"), lost,
        f"one interruption in {in_words(INTERRUPTED_EVERY)} (assumed), a save every {in_words(between)} ({note})",
    )  # fmt: skip


def _save(seen: Measurement) -> tuple[float, str]:
    """Seconds of one save, and how that is known."""
    saving = seen.anatomy.checkpointing
    if saving.value and saving.n:
        return saving.value / saving.n, f"{in_words(saving.value / saving.n)} each, measured"
    state = seen.work.parameters + seen.work.optimizer_state if seen.work is not None else 0.0
    stall = max(state / WRITTEN, 1.0)
    return stall, f"{in_words(stall)} each, assumed"


def break_even(device: DeviceFigures, offers: Sequence[OfferFigures]) -> Quantity | None:
    """Hours of use after which buying one device costs less than the cheapest on-demand offer of it.

    The device alone, without the machine around it, its room and its people; electricity at `ELECTRICITY`. None where
    nothing is known to compare; unknown where renting is cheaper than running it, so that it never pays.
    """
    hours = [offer.hour / offer.count for offer in offers if offer.hour is not None and offer.currency == "USD"]
    watts = power(device)
    if device.purchase is None or not hours or watts.value is None:
        return None
    rent = min(hours)
    running = [price * use / 1000 for price, use in zip(
        (ELECTRICITY[0], ELECTRICITY[1], ELECTRICITY[2]), (watts.value, watts.low or 0.0, watts.high or watts.value),
        strict=True)]  # fmt: skip
    if rent <= running[0]:
        return unknown("h")
    value, low = device.purchase / (rent - running[0]), device.purchase / (rent - running[1])
    high = device.purchase / (rent - running[2]) if rent > running[2] else None
    return estimated(value, "h", low, high)


def times(left: Quantity, right: Quantity, unit: str) -> Quantity:
    """The product of two estimates, ends with ends (both err the same way); unknown where either is."""
    if left.value is None or right.value is None:
        return unknown(unit)
    return estimated(left.value * right.value, unit, _end(left, "low") * _end(right, "low"),
                     _end(left, "high") * _end(right, "high"))  # fmt: skip


def plus(left: Quantity, right: Quantity) -> Quantity:
    """The sum; what is unknown on the right adds nothing, since it is small against what stands on the left."""
    if left.value is None or right.value is None:
        return left
    return estimated(left.value + right.value, left.unit, _end(left, "low") + _end(right, "low"),
                     _end(left, "high") + _end(right, "high"))  # fmt: skip


def _end(quantity: Quantity, side: str) -> float:
    found = quantity.low if side == "low" else quantity.high
    value = found if found is not None else quantity.value
    assert value is not None
    return max(value, 0.0)


def _scaled(quantity: Quantity, factor: float, unit: str) -> Quantity:
    if quantity.value is None or not math.isfinite(factor):
        return unknown(unit)
    return estimated(quantity.value * factor, unit, _end(quantity, "low") * factor, _end(quantity, "high") * factor)
