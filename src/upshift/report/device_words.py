"""A device of the catalogue in words: its figures with unit, source and date, and what it costs to rent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from upshift import units
from upshift.hardware.catalog import FIGURES, PEAKS, Device
from upshift.hardware.offer import Offer
from upshift.report.words import UNKNOWN, clean

#: Offers that are shown; the others are counted.
MOST_OFFERS = 12

_TITLES = {"interconnect": "interconnect, each way", "price": "purchase price", "power": "power, at most"}
_KINDS = {"gpu": "GPUs", "tpu": "TPUs", "accelerator": "accelerators", "cpu": "processors"}


def figure(name: str, value: float | None, currency: str = "USD") -> str:
    """A figure with its unit: `3.35 TB/s`, `USD 11,805`, `unknown`."""
    if value is None:
        return UNKNOWN
    if name == "price":
        return money(value, currency)
    if name in ("power", "cores"):
        return f"{value:,.6g} {FIGURES[name]}"
    return units.si(value, FIGURES[name])


def money(value: float | None, currency: str = "USD") -> str:
    """An amount: `USD 2.95`, `USD 11,805`."""
    if value is None:
        return UNKNOWN
    amount = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"
    return f"{clean(currency, 10)} {amount}"


def listing(devices: Mapping[str, Device]) -> list[str]:
    """Short names by kind, for a list of everything there is."""
    lines = []
    for kind, title in _KINDS.items():
        names = [clean(name, 60) for name, device in devices.items() if device.kind == kind]
        width = max(map(len, _KINDS.values())) + 2
        row = f"    {title:<{width}}"
        for number, name in enumerate(names, 1):
            word = name + "," * (number < len(names))
            if len(row) + len(word) > 100 and row.strip():
                lines.append(row.rstrip())
                row = " " * (4 + width)
            row += f"{word} "
        if names:
            lines.append(row.rstrip())
    return lines


def page(name: str, device: Device, offers: Sequence[Offer], family: Sequence[str] = ()) -> list[str]:
    """All that is known of a device.

    Args:
        name: its short name.
        offers: of this device, in the order to be shown.
        family: names of devices that are easily taken for it.
    """
    notes: list[str] = []

    def note(text: str, date: str) -> str:
        line = f"{clean(text, 400)}{f' ({clean(date, 60)})' if date else ''}"
        if line not in notes:
            notes.append(line)
        return f"[{notes.index(line) + 1}]"

    known = device.figures()
    lines = [f"{clean(name, 60)}: {clean(device.title, 200) or _KINDS[device.kind][:-1]}", ""]
    rows = [
        (_TITLES.get(item, item), figure(item, value, device.currency), device.source_of(item))
        for item, value in known.items()
    ]
    if device.capability:
        rows.append(("compute capability", clean(device.capability, 20), device.source_of("capability")))
    for title, value, source in rows:
        lines.append(f"{title:<24}{value:<16}{note(source.text, source.date)}")
    missing = [_TITLES.get(item, item) for item in FIGURES if item not in known and _expected(item, device)]
    lines.append(f"{UNKNOWN:<24}{', '.join(missing) or 'nothing'}")
    lines.append("Stated by makers, so estimated here, not measured; peaks are dense (without structured sparsity).")
    if device.note:
        lines.append(clean(device.note, 400))
    if family:
        lines.append(f"Not to be taken for {', '.join(clean(item, 60) for item in family)}.")
    lines += ["", *_offers(offers, note)]
    lines += ["", "sources", *(f"  [{number}] {line}" for number, line in enumerate(notes, 1))]
    return lines


def markdown(devices: Mapping[str, Device]) -> list[str]:
    """The table of the documentation."""
    shown = ("float32", "bfloat16", "float16", "float8", "memory", "bandwidth", "interconnect", "power", "price")
    lines = [f"| device | {' | '.join(shown)} |", f"| --- |{' --- |' * len(shown)}"]
    for name, device in devices.items():
        values = (figure(item, getattr(device, item), device.currency).replace(UNKNOWN, "") for item in shown)
        lines.append(f"| {clean(name, 60)} | {' | '.join(values)} |")
    return lines


def _offers(offers: Sequence[Offer], note: Callable[[str, str], str]) -> list[str]:
    if not offers:
        return ["to rent: no offer is known. [[offers]] in .upshift/hardware.toml adds one."]
    width = max(len(clean(f"{offer.provider} {offer.instance}", 60)) for offer in offers[:MOST_OFFERS]) + 2
    lines = [f"{'to rent, an hour':<{width + 2}}{'devices':<9}{'on demand':<14}{'each':<14}{'spot':<14}where"]
    for offer in offers[:MOST_OFFERS]:
        cells = "".join(f"{money(item, offer.currency):<14}" for item in (offer.hour, offer.per_device, offer.spot))
        where = f"{clean(offer.region, 40)} {note(offer.source, offer.date)}".strip()
        lines.append(f"  {clean(f'{offer.provider} {offer.instance}', 60):<{width}}{offer.count:<9}{cells}{where}")
    if len(offers) > MOST_OFFERS:
        lines.append(f"  and {len(offers) - MOST_OFFERS} more, which cost more for each device")
    return lines


def _expected(item: str, device: Device) -> bool:
    """Whether a figure is one that a device of this kind has, so that its absence is worth a word."""
    if device.kind == "cpu":
        return item in ("float32", "bfloat16", "bandwidth", "power", "cores", "price")
    return item != "cores" and (item not in PEAKS or item in ("float32", "bfloat16", "float16"))
