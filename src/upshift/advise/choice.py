"""How many of which device for a budget and a deadline; what comes nearest where nothing in the catalogue does it.

Several devices train by data parallelism: each takes as many samples a step as one alone would, so that n of them need
1/n of the steps for the same samples. The gradients are summed once a step by a ring, 2 (n - 1) / n of their bytes over
each link (Patarasuk and Yuan 2009), not hidden behind the backward pass. Where the speed of the links is not known they
count as free, so the time is a lower bound, and a note says so. More than one machine is not looked at: what lies
between machines is not in the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from upshift.advise.assessing import cost, plus, times
from upshift.records.estimate import Choice, DeviceEstimate, OfferFigures
from upshift.records.measurement import Measurement
from upshift.records.quantity import Quantity, estimated, unknown

#: Numbers of devices looked at where no machine for rent says how many it has.
COUNTS = (1, 2, 4, 8)


def total_of(
    found: DeviceEstimate, count: int, steps: Quantity, startup: Quantity, gradients: float | None
) -> Quantity:
    """Seconds of the whole training on `count` such devices of one machine.

    Args:
        gradients: bytes summed each step; None: not known.
    """
    if count == 1:
        return found.total
    if found.step.value is None or steps.value is None:
        return unknown("s")
    links = found.device.interconnect
    extra = 2 * (count - 1) / count * gradients / links if links and gradients else 0.0
    step = plus(found.step, estimated(extra, "s"))
    fewer = estimated(steps.value / count, "steps")
    return plus(times(step, fewer, "s"), startup)


def options(
    found: DeviceEstimate,
    offers: Sequence[OfferFigures],
    steps: Quantity,
    seen: Measurement,
) -> Iterable[Choice]:
    """All numbers of one device that could be had: as machines for rent hold them, or 1 to 8 where none is known."""
    if found.fits is not True or found.total.value is None:
        return
    rough = found.order_of_magnitude
    gradients = seen.work.gradients if seen.work is not None else None
    note = "" if found.device.interconnect else "links between the devices counted as free: their speed is not known"
    for count in sorted({offer.count for offer in offers} or set(COUNTS)):
        seconds = total_of(found, count, steps, seen.anatomy.startup, gradients)
        said = note if count > 1 else ""
        held = [offer for offer in offers if offer.count == count]
        if not held:
            yield Choice(found.device.name, count, seconds, unknown("USD"), note=said, order_of_magnitude=rough)
        for offer in held:
            price = cost(offer, seconds, seen)
            where = " ".join(item for item in (offer.provider, offer.instance) if item)
            for spot in (False, True):
                share = price.spot if spot else price.on_demand
                if share.value is None:
                    continue
                money = times(share, estimated(float(count), ""), offer.currency)
                longer = plus(seconds, price.lost) if spot else seconds
                yield Choice(found.device.name, count, longer, money, spot, where, note=said, order_of_magnitude=rough)


def choose(
    choices: Iterable[Choice], budget: float | None, deadline: float | None, most: int = 5
) -> tuple[Choice, ...]:
    """Those within budget and deadline, cheapest first (then fastest); where there is none, the nearest alone.

    A choice whose price is not known is within no budget. Points decide, not intervals: what is near a limit may miss
    it, which the intervals show.
    """
    known = list(choices)
    if not known:
        return ()

    def excess(item: Choice) -> float:
        over = 1.0
        if deadline is not None and item.seconds.value is not None:
            over = max(over, item.seconds.value / deadline)
        if budget is not None:
            over = max(over, item.money.value / budget if item.money.value is not None else float("inf"))
        return over

    within = [item for item in known if excess(item) <= 1.0]
    if within:
        infinite = float("inf")
        within.sort(key=lambda item: (item.money.or_else(infinite), item.seconds.or_else(infinite), item.count))
        # One line a device and number: the cheapest way to have them.
        first: dict[tuple[str, int], Choice] = {}
        for item in within:
            first.setdefault((item.device, item.count), item)
        return tuple(first.values())[:most]
    nearest = min(known, key=lambda item: (excess(item), item.seconds.or_else(float("inf"))))
    return (msgspec.structs.replace(nearest, within=False),)
