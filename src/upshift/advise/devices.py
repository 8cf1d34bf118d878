"""Devices as estimates see them: from the catalogue, from the prices, and the machine at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from upshift.hardware.catalog import Device, pick
from upshift.hardware.offer import Offer
from upshift.hardware.probe import Peaks
from upshift.hardware.rates import Price
from upshift.records.estimate import DeviceFigures, OfferFigures
from upshift.records.measurement import Measurement


def figures(name: str, device: Device) -> DeviceFigures:
    """An entry of the catalogue. A figure it does not hold stays unknown; a price in another currency is left out."""
    return DeviceFigures(
        name=name,
        kind=device.kind,
        flops=device.peaks(),
        bandwidth=device.bandwidth,
        memory=device.memory,
        interconnect=device.interconnect,
        watts=device.power,
        purchase=device.price if device.currency == "USD" else None,
        source=device.source,
        date=device.date,
    )


def chosen(names: Sequence[str], catalogue: Mapping[str, Device]) -> list[DeviceFigures]:
    """The devices named, each once; where none is, all that are no CPUs.

    Raises:
        UsageError: no such device, or a name that fits several.
    """
    if not names:
        return [figures(name, device) for name, device in catalogue.items() if device.kind != "cpu"]
    return [figures(*item) for item in dict(pick(name, catalogue) for name in names).items()]


def offers(found: Iterable[Offer]) -> dict[str, list[OfferFigures]]:
    """Device -> machines that can be rented with it, the cheapest for a device first; without a price: left out."""
    known: dict[str, list[OfferFigures]] = {}
    for item in found:
        if not item.device or item.count < 1 or (item.hour is None and item.spot is None):
            continue
        offer = OfferFigures(
            provider=item.provider, instance=item.instance, count=item.count, hour=item.hour, spot=item.spot,
            region=item.region, currency=item.currency, source=item.source, date=item.date,
        )  # fmt: skip
        known.setdefault(item.device, []).append(offer)
    for items in known.values():
        items.sort(key=lambda item: (item.hour if item.hour is not None else item.spot or 0.0) / item.count)
    return known


def priced(price: Price) -> OfferFigures:
    """A price that a person gave, as an offer of one device."""
    return OfferFigures(provider=price.source or "given", instance="", count=1, hour=price.per_hour,
                        currency=price.currency, source=price.source)  # fmt: skip


def at_hand(
    seen: Measurement,
    peaks: Peaks | None,
    name: str,
    memory: float | None,
    watts: tuple[float, float] | None = None,
    stated: DeviceFigures | None = None,
) -> DeviceFigures:
    """The machine the training was watched on, by what was measured of it.

    Args:
        peaks: of the probe; None: what the diagnosis kept of them.
        name: as the system names the device. memory: bytes.
        watts: idle and busy, of the whole device.
        stated: its entry of the catalogue, for what the probe does not measure.
    """
    flops: dict[str, float] = {}
    bandwidth: float | None = None
    if peaks is not None:
        flops = {dtype: peak.value for dtype, peak in peaks.flops.items() if peak.value}
        bandwidth = peaks.bandwidth.value
    elif seen.floor is not None:
        floor = seen.floor
        kept = ((floor.dtype, floor.peak_flops), (floor.best_dtype, floor.best_peak_flops))
        flops = {dtype: peak.value for dtype, peak in kept if peak.value}
        bandwidth = floor.bandwidth.value
    idle, busy = watts if watts is not None else (None, None)
    return DeviceFigures(
        name=name,
        kind="cpu" if seen.facts.device.startswith("cpu") else "gpu",
        flops=flops,
        bandwidth=bandwidth,
        memory=memory if memory is not None else (stated.memory if stated is not None else None),
        interconnect=stated.interconnect if stated is not None else None,
        watts_idle=idle if idle is not None else (stated.watts_idle if stated is not None else None),
        watts=busy if busy is not None else (stated.watts if stated is not None else None),
        purchase=stated.purchase if stated is not None else None,
        measured=True,
        source="measured on this machine" + (f"; {stated.source}" if stated is not None else ""),
    )
