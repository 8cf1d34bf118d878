"""What the page of a run shows of its machine: utilisation, memory and power over time, alarms, and the books."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

from upshift.records.ledger import Ledger
from upshift.records.resources import PowerLimit, Resources, Sample
from upshift.report import ledger_words, words
from upshift.report.drawing import Axis, Drawing, drawable, nice_ticks
from upshift.report.views import Cell, Column, Figure, _figure

#: Points of a curve; of more, the mean of each bucket is drawn and its extremes as a band.
MOST_POINTS = 400

#: A limit further above the values than this factor would flatten their curve, and is left out.
NEAR = 5.0

#: Rows of the table of alarms.
MOST_ALARMS = 200

#: Units of the time axis: from so many seconds on, the seconds of one, and its name.
_TIMES = ((4 * 86400.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


class Point(NamedTuple):
    """A value over a stretch of time: its mean, and the least and the most of what it stands for."""

    at: float
    mean: float | None
    low: float | None = None
    high: float | None = None


def resources_view(resources: Resources | None, ledger: Ledger | None, ident: str = "used") -> dict[str, Any] | None:
    """The section on resources; None where nothing is known at all.

    Args:
        resources: of the run; None: none were recorded.
        ledger: its books; None: none were kept.
        ident: unique on the page.
    """
    if resources is None and ledger is None:
        return None
    samples = continued(resources.samples) if resources is not None else []
    head = resources.head if resources is not None else None
    alarms = resources.alarms if resources is not None else ()
    # An alarm of an earlier start has no place on an axis of all of them.
    marks = [item.at for item in alarms] if len(samples) == len(_last_start(samples, resources)) else []
    charts = []
    for name, title, points, form, limit, most in _curves(samples, head.cores if head else None, head):
        drawn = _chart(points, f"{ident}-{name}", title, form, limit, most, marks)
        if drawn is not None:
            charts.append({"title": title, "figure": drawn})
    lead = "Nothing was recorded of the machine beside this run."
    if samples:
        looks = f"{len(samples):,} looks" if len(samples) > 1 else "one look"
        lead = (
            f"{looks.capitalize()} at the machine beside the run, over {words.duration(samples[-1].at)}. A line is "
            "the mean between two looks, the band its extremes where many looks fall on one point. Memory and power "
            "are those at the looks: what came and went between two is not seen."
        )
    notes = [*(head.notes if head is not None else ())]
    if head is not None and head.energy:
        notes.append(f"Energy: {head.energy}")
    notes += [limit_text(item) for item in head.power_limits] if head is not None else []
    if resources is not None and words.finite(resources.overhead_seconds):
        notes.append(f"Looking took {words.duration(resources.overhead_seconds)} of CPU time.")
    if resources is not None and resources.torn_lines:
        notes.append(f"{resources.torn_lines:,} lines of the samples could not be read.")
    return {
        "lead": lead,
        "charts": charts,
        "alarm_columns": (Column("alarm"), Column("at"), Column("what it means")),
        "alarms": [
            (Cell(words.clean(item.name, 80)), Cell(words.duration(item.at)), Cell(words.clean(item.text, 500)))
            for item in alarms[:MOST_ALARMS]
        ],
        "more_alarms": max(len(alarms) - MOST_ALARMS, 0),
        "book_columns": (Column("figure"), Column("value"), Column("basis"), Column("how it is known")),
        "books": _books(ledger) if ledger is not None else [],
        "notes": [words.clean(note, 500) for note in notes],
    }


def limit_text(limit: PowerLimit) -> str:
    """`Power limit of H200 (0): 450 W (700 W by default, 200 W to 700 W can be set)`."""
    more = [f"{limit.default:.0f} W by default"] if words.finite(limit.default) else []
    if words.finite(limit.least) and words.finite(limit.most):
        more.append(f"{limit.least:.0f} W to {limit.most:.0f} W can be set")
    now = f"{limit.now:.0f} W" if words.finite(limit.now) else words.UNKNOWN
    return f"Power limit of {limit.name}: {now}" + (f" ({', '.join(more)})" if more else "")


def _books(ledger: Ledger) -> list[tuple[Cell, ...]]:
    pills = {"measured": "good", "estimated": "warn"}
    return [
        (
            Cell(ledger_words.LABELS[field]),
            Cell(
                ledger_words.amount_text(field, entry.value, ledger.currency),
                ledger_words.interval_text(field, entry.value, ledger.currency),
            ),
            Cell(basis := words.basis_text(entry.value), pill=pills.get(basis, "plain")),
            Cell(words.clean(entry.how, 600)),
        )
        for field, entry in ledger_words.entries(ledger)
    ]


def continued(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of all starts on one axis of time: each start begins where the one before ended."""
    found: list[Sample] = []
    before, last = 0.0, 0.0
    for item in samples:
        if not words.finite(item.at):
            continue
        if item.at < last:
            before += last
        last = item.at
        found.append(_moved(item, before + item.at) if before else item)
    return found


def _moved(sample: Sample, at: float) -> Sample:
    return Sample(**{name: getattr(sample, name) for name in sample.__struct_fields__ if name != "at"}, at=at)


def _last_start(samples: Sequence[Sample], resources: Resources | None) -> Sequence[Sample]:
    raw = resources.samples if resources is not None else ()
    falls = [place for place, (a, b) in enumerate(pairwise(raw), 1) if b.at < a.at]
    return samples[falls[-1] :] if falls else samples


_Curve = tuple[str, str, list[Point], Callable[[float], str], float | None, float | None]


def _curves(samples: Sequence[Sample], cores: float | None, head: Any) -> list[_Curve]:
    """(name, title, points, form of a value, limit, top of the axis) of each chart."""
    of_cores = f"CPU utilisation, of {words.number(cores)} cores" if cores else "Cores kept busy"
    cpu = [
        Point(b.at, value / (cores or 1.0) if (value := _rate(a.cpu_seconds, b.cpu_seconds, b.at - a.at)) else value)
        for a, b in pairwise(samples)
    ]
    share = words.percent if cores else words.number
    count = max((len(item.gpus) for item in samples), default=0)
    each = f", mean and extremes of {count}" if count > 1 else ""

    def gpus(name: str) -> list[Point]:
        return [_spread(item.at, [getattr(gpu, name) for gpu in item.gpus]) for item in samples]

    totals = [gpu.memory_total for item in samples[-1:] for gpu in item.gpus if words.finite(gpu.memory_total)]
    whole = min(totals, default=None)
    limit = head.memory_limit if head is not None else None
    basis = "measured" if head is not None and head.energy_basis == "measured" else "estimated"
    return [
        ("cpu", of_cores, cpu, share, None, 1.0 if cores else None),
        ("gpu", f"Accelerator utilisation{each}", gpus("utilisation"), words.percent, None, 1.0),
        ("memory", "Host memory of the process tree", [Point(s.at, s.memory) for s in samples], _bytes, limit, None),
        ("gpu-memory", f"Accelerator memory{each}", gpus("memory"), _bytes, whole, None),
        ("power", f"Power ({basis})", [Point(s.at, s.watts) for s in samples], _power, None, None),
        ("gpu-power", f"Accelerator power{each}", gpus("watts"), _power, None, None),
    ]


def _rate(first: float | None, last: float | None, seconds: float) -> float | None:
    if not (words.finite(first) and words.finite(last)) or seconds <= 0 or last < first:
        return None
    return (last - first) / seconds


def _spread(at: float, values: Sequence[float | None]) -> Point:
    known = [value for value in values if words.finite(value)]
    return Point(at, sum(known) / len(known), min(known), max(known)) if known else Point(at, None)


def _bytes(value: float) -> str:
    return words.value_text(value, "B")


def _power(value: float) -> str:
    return f"{words.number(words.three(value))} W"


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: means of neighbours, with the extremes of all that they stand for."""
    size = math.ceil(len(points) / most) if most > 0 else 1
    if size <= 1:
        return list(points)
    found = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        known = [item for item in bucket if item.mean is not None]
        if not known:
            found.append(Point(bucket[-1].at, None))
            continue
        lows = [item.mean if item.low is None else item.low for item in known]
        highs = [item.mean if item.high is None else item.high for item in known]
        mean = sum(item.mean or 0.0 for item in known) / len(known)
        low, high = min(v for v in lows if v is not None), max(v for v in highs if v is not None)
        found.append(Point(bucket[-1].at, mean, low, high))
    return found


def _chart(
    points: Sequence[Point],
    ident: str,
    title: str,
    form: Callable[[float], str],
    limit: float | None,
    most: float | None,
    marks: Sequence[float],
) -> Figure | None:
    shown = [item for item in points if drawable(item.at) and (item.mean is None or drawable(item.mean))]
    if sum(item.mean is not None for item in shown) < 2:
        return None
    drawn = thinned(shown)

    def draw(width: float, name: str) -> Markup | None:
        return over_time(drawn, width, name, title=title, form=form, limit=limit, most=most, marks=marks)

    return _figure(draw, ident)


def over_time(
    points: Sequence[Point],
    width: float,
    ident: str,
    *,
    title: str,
    form: Callable[[float], str],
    limit: float | None = None,
    most: float | None = None,
    marks: Sequence[float] = (),
) -> Markup | None:
    """One figure over the seconds of a run, from zero.

    Args:
        limit: drawn as a dashed line where the values come near it (None: there is none).
        most: the axis reaches at least so far.
        marks: moments to mark at the upper edge: alarms.
    """
    highs = [high for item in points if (high := item.mean if item.high is None else item.high) is not None]
    top = max([*highs, most or 0.0])
    near = words.finite(limit) and drawable(limit) and 0 < limit <= NEAR * top
    if near and limit is not None:
        top = max(top, limit)
    if top <= 0:
        top = 1.0
    narrow = width < 560
    left, right, above, below = (64.0 if narrow else 76.0), 8.0, 12.0, 42.0
    height = 170.0 if narrow else 190.0
    begin, end = min(points[0].at, 0.0), max(item.at for item in points)
    xs = Axis(begin, end, left, width - right)
    ys = Axis(0.0, top * 1.04, height - below, above)
    means = [item.mean for item in points if item.mean is not None]
    desc = f"Over {words.duration(end)}: from {form(means[0])} to {form(means[-1])}, at most {form(max(highs))}."
    if near and limit is not None:
        desc += f" The limit is {form(limit)}."
    drawing = Drawing(width, height, title, desc, ident)
    # Bytes are told in powers of 1024, so their round figures are round in those.
    scale = next((2.0**power for power in (40, 30, 20, 10) if top >= 2.0**power), 1.0) if form is _bytes else 1.0
    for tick in (scale * place for place in nice_ticks(0.0, top / scale, 4)):
        drawing.line(left, ys(tick), width - right, ys(tick), "grid")
        drawing.text(left - 8, ys(tick) + 4, form(tick), "small", "end")
    piece: list[Point] = []
    for item in [*points, Point(end, None)]:
        if item.mean is not None and item.low is not None and item.high is not None:
            piece.append(item)
            continue
        drawing.area([(xs(p.at), ys(p.high or 0.0)) for p in piece], [(xs(p.at), ys(p.low or 0.0)) for p in piece],
                     "band")  # fmt: skip
        piece = []
    drawing.path([(xs(item.at), None if item.mean is None else ys(item.mean)) for item in points], "curve planned")
    if near and limit is not None:
        drawing.line(left, ys(limit), width - right, ys(limit), "one")
        drawing.text(width - right, ys(limit) + 14, f"limit {form(limit)}", "small", "end")
    for mark in marks:
        if begin <= mark <= end:
            drawing.line(xs(mark), above, xs(mark), above + 10, "bad")
    each, name = next((seconds, name) for least, seconds, name in _TIMES if end - begin >= least)
    for tick in nice_ticks(begin / each, end / each, 4 if narrow else 8):
        drawing.text(xs(tick * each), height - 23, f"{tick:,.4g}", "small", "middle")
    drawing.text((left + width - right) / 2, height - 5, f"{name} since the run began", "small", "middle")
    return drawing.markup()
