"""An estimate as one screen of a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from upshift import units
from upshift.records.estimate import Choice, DeviceEstimate, Error, Estimate
from upshift.records.quantity import Quantity
from upshift.report import words
from upshift.report.blocks import facts, grid, head, indent, line, title

#: Devices shown; more are counted.
MOST = 12

#: Devices with the ways to make it fit spelled out.
MOST_REMEDIES = 6

_JOULES_PER_KWH = 3.6e6


def render_estimate(found: Estimate, most: int = MOST) -> RenderableType:
    """What the training would need on each device, what to rent or buy, and how all of it is known."""
    shown = found.devices[:most]
    parts: list[RenderableType] = [title("estimate", found.script, found.arguments), Text(), _asked(found), Text()]
    parts += [head("This machine, measured"), indent(_here(found)), Text()]
    if shown:
        parts += [head("On other hardware, estimated"), indent(_table(shown, found.currency))]
        if len(found.devices) > len(shown):
            parts.append(
                indent(line(f"{len(found.devices) - len(shown)} more with --json, or named with --gpu", "dim"))
            )
        parts += [indent(item) for item in _remarks(shown)]
    if found.choices:
        parts += [Text(), head(_limits(found)), indent(_choices(found.choices))]
    parts += [Text(), *(line(text, "bold") for text in found.advice)] if found.advice else []
    if found.compared:
        parts += [Text(), head("Estimated and then measured"), indent(_compared(found.compared))]
    parts.append(Text())
    parts += [line(f"- {text}", "dim") for text in (*found.methods, *found.notes, found.experience) if text]
    parts.append(line("~ stands before an order of magnitude; nothing unknown is counted as 0.", "dim"))
    return Group(*parts)


def _asked(found: Estimate) -> RenderableType:
    steps = words.number(found.steps.value) if found.steps.value is not None else words.UNKNOWN
    rows = [
        ("samples of a pass", words.number(float(found.batch)) if found.batch else words.UNKNOWN),
        ("precision", found.precision),
        ("steps", f"{steps} ({found.steps_how})" if found.steps_how else steps),
    ]
    return facts(rows)


def _here(found: Estimate) -> RenderableType:
    here = found.here
    rows = [
        ("device", here.device.name),
        ("step", step_text(here)),
        ("memory", f"{memory_text(here)}{_parts(here)}"),
        ("largest batch", _batch(here.largest_batch)),
        ("whole training", span(here.total)),
        ("energy", energy(here.energy)),
    ]
    if here.costs:
        rows.append(("cost", f"{money(here.costs[0].on_demand)}, {words.clean(here.costs[0].offer.source, 80)}"))
    if here.carbon.value is not None:
        rows.append(("carbon", f"{words.number(here.carbon.value)} g CO2e (estimated)"))
    return facts(rows)


def _table(devices: Sequence[DeviceEstimate], currency: str) -> RenderableType:
    table = grid(
        ("device", ""), ("fits", ""), ("memory", "right"), ("largest batch", "right"), ("step", "right"),
        ("whole training", "right"), (f"cost, {words.clean(currency, 8)}", "right"), ("energy", "right"),
    )  # fmt: skip
    for item in devices:
        fits = {True: "yes", False: "no", None: words.UNKNOWN}[item.fits]
        style = {True: "green", False: "red", None: ""}[item.fits]
        cells = (
            memory_text(item),
            _batch(item.largest_batch),
            step_text(item),
            span(item.total, item.order_of_magnitude),
            cost_text(item),
            energy(item.energy, item.order_of_magnitude),
        )
        table.add_row(line(item.device.name, "cyan"), line(fits, style), *map(line, cells))
    return table


def _remarks(devices: Sequence[DeviceEstimate]) -> Iterable[RenderableType]:
    """What would make it fit, when buying pays, and what is not known, per device."""
    for item in [one for one in devices if one.remedies][:MOST_REMEDIES]:
        ways = "; ".join(_remedy(way.techniques, way.memory, way.batch) for way in item.remedies)
        yield line(f"{item.device.name} would hold it with {ways}", "yellow")
    for item in devices:
        if item.break_even is None:
            continue
        name = item.device.name
        if item.break_even.value is None:
            yield line(f"{name}: renting costs less than the electricity of one's own, so buying never pays", "dim")
        else:
            hours = words.number(float(f"{item.break_even.value:.2g}"))
            text = f"{name}: buying pays after about {hours} hours of use, the machine around it not counted"
            yield line(f"{text} (estimated)", "dim")
    by_note: dict[str, list[str]] = {}
    for item in devices:
        for note in item.notes:
            by_note.setdefault(note, []).append(item.device.name)
    for note, names in by_note.items():
        yield line(f"{', '.join(names[:4])}{' and others' if len(names) > 4 else ''}: {note}", "dim")


def _remedy(techniques: Sequence[str], peak: Quantity, batch: int | None) -> str:
    what = " + ".join(words.clean(name, 60) for name in techniques) or f"passes of {batch or 0:,} samples"
    return f"{what} ({words.value_text(peak.value, 'B')})"


def _limits(found: Estimate) -> str:
    limits = []
    if found.budget is not None:
        limits.append(f"{words.number(found.budget)} {words.clean(found.currency, 8)}")
    if found.deadline is not None:
        limits.append(words.duration(found.deadline))
    if not limits:
        return "To rent"
    inside = found.choices[0].within
    return f"Within {' and '.join(limits)}" if inside else f"Not within {' and '.join(limits)}; the nearest"


def _choices(choices: Sequence[Choice]) -> RenderableType:
    table = grid(("devices", ""), ("where", ""), ("time", "right"), ("cost", "right"), ("", ""))
    for item in choices:
        where = f"{item.instance}{', spot' if item.spot else ''}" if item.instance else words.UNKNOWN
        table.add_row(
            line(f"{item.count} x {item.device}", "cyan"), line(where),
            line(span(item.seconds, item.order_of_magnitude)), line(money(item.money, item.order_of_magnitude)),
            line(item.note, "dim"),
        )  # fmt: skip
    return table


def _compared(errors: Sequence[Error]) -> RenderableType:
    table = grid(("", ""), ("estimated", "right"), ("measured", "right"), ("off by", "right"))
    for item in errors:
        table.add_row(
            line(item.what), line(words.value_text(item.predicted, item.unit)),
            line(words.value_text(item.measured, item.unit)), line(words.percent(item.relative, signed=True)),
        )  # fmt: skip
    return table


def memory_text(item: DeviceEstimate) -> str:
    """`11.2 GiB of 24 GB`; what a maker calls 24 GB are 24e9 bytes."""
    needed = words.value_text(item.memory.value, "B")
    there = f" of {words.value_text(item.device.memory, 'B')}" if item.device.memory else ""
    return f"{needed}{there}"


def _parts(item: DeviceEstimate) -> str:
    named = [f"{name} {words.value_text(part.value, 'B')}" for name, part in item.parts.items() if part.value]
    return f" ({', '.join(named)})" if named else ""


def step_text(item: DeviceEstimate) -> str:
    """A step with its interval, or `~` before an order of magnitude."""
    if item.order_of_magnitude and item.step.value is not None:
        return f"~{words.duration(_one(item.step.value))}"
    return words.quantity_text(item.step, n=False).replace(" (estimated)", "")


def span(total: Quantity, rough: bool = False) -> str:
    """A duration with its ends."""
    if total.value is None:
        return words.UNKNOWN
    if rough:
        return f"~{words.duration(_one(total.value))}"
    if total.low is None or total.high is None or total.low == total.high:
        return words.duration(total.value)
    return f"{words.duration(total.value)} ({words.duration(total.low)} to {words.duration(total.high)})"


def energy(joules: Quantity, rough: bool = False) -> str:
    """Joules as kilowatt-hours with their ends."""
    if joules.value is None:
        return words.UNKNOWN
    value = joules.value / _JOULES_PER_KWH
    if rough:
        return f"~{_kwh(_one(value))}"
    if joules.low is None or joules.high is None:
        return _kwh(value)
    return f"{_kwh(value)} ({_kwh(joules.low / _JOULES_PER_KWH)} to {_kwh(joules.high / _JOULES_PER_KWH)})"


def _kwh(value: float) -> str:
    return units.si(value * 1000, "Wh")


def cost_text(item: DeviceEstimate) -> str:
    """The cheapest offer, and as a spot machine where that is cheaper."""
    rough = item.order_of_magnitude
    known = [cost for cost in item.costs if cost.on_demand.value is not None]
    spot = min((cost.spot.value for cost in item.costs if cost.spot.value is not None), default=None)
    if not known:
        return words.UNKNOWN if spot is None else f"spot {_money(spot, rough)}"
    best = min(cost.on_demand.or_else(0.0) for cost in known)
    return _money(best, rough) + (f", spot {_money(spot, rough)}" if spot is not None and spot < best else "")


def money(amount: Quantity, rough: bool = False) -> str:
    """`12.30 USD (11.00 to 14.20)`, or `~10 USD`."""
    if amount.value is None:
        return words.UNKNOWN
    text = f"{_money(amount.value, rough)} {words.clean(amount.unit, 8)}"
    if rough or amount.low is None or amount.high is None:
        return text
    return f"{text} ({_money(amount.low)} to {_money(amount.high)})"


def _money(value: float, rough: bool = False) -> str:
    if rough:
        return f"~{words.number(_one(value))}"
    return f"{value:,.2f}" if value >= 0.005 or value == 0 else f"{value:.1g}"


def _one(value: float) -> float:
    """One significant digit: more would say too much of an order of magnitude."""
    return float(f"{value:.0e}")


def _batch(batch: Quantity) -> str:
    if batch.value is None:
        return words.UNKNOWN
    return words.number(batch.value) if batch.value < 1e9 else "more than 1,000,000,000"
