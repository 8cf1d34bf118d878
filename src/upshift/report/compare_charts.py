"""The pictures of a comparison as inline SVG: curves of all runs, bars with intervals, performance against its price.

An approach keeps its place in the list as its mark in every picture: a colour, and a dash or a letter for those who
do not see colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from upshift.report import words
from upshift.report.drawing import Axis, Drawing, drawable, fit, nice_ticks, text_width

#: Marks that differ; later approaches take them again.
MARKS = 8
#: Bars of one figure, and runs of one approach, that are drawn.
MOST_BARS, MOST_CURVES = 24, 20
#: Lengths of an axis below this are none.
TINY = 1e-30


class Curve(NamedTuple):
    """One run: its approach's name and place, and (x, y) in the order of x; y None where it is not finite."""

    name: str
    place: int
    points: tuple[tuple[float, float | None], ...]


class Bar(NamedTuple):
    """A middle value with its interval (None: none) and its text."""

    name: str
    place: int
    value: float
    low: float | None
    high: float | None
    text: str


class Panel(NamedTuple):
    """The bars of one figure, on an axis of its own."""

    title: str
    bars: tuple[Bar, ...]


class Spot(NamedTuple):
    """An approach at its price and performance; `front`: none does as well for as little."""

    name: str
    place: int
    x: float
    y: float
    front: bool
    tip: str


def mark(place: int) -> str:
    """The CSS class of an approach."""
    return f"a{place % MARKS}"


def letter(place: int) -> str:
    """A, B, C ... for approaches in order; numbers beyond Z."""
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def _tick(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    # What differs by rounding only is drawn as one height.
    flat = high - low <= max(1e-12 * size, TINY)
    air = max(size * 0.05, 1e-9) if flat else (high - low) * 0.06
    return low - air, high + air


def _legend(drawing: Drawing, entries: Sequence[tuple[str, int]], width: float) -> None:
    """Names with their lines, in rows; the drawing has room for `_legend_rows`."""
    x, y = 0.0, 13.0
    for name, place in entries:
        label = fit(name, min(220.0, width - 60))
        wide = 34 + text_width(label, 12.5) + 18
        if x > 0 and x + wide > width:
            x, y = 0.0, y + 20
        drawing.line(x, y, x + 26, y, f"cmp {mark(place)}")
        drawing.text(x + 33, y + 4, label, "small")
        x += wide


def _legend_rows(entries: Sequence[tuple[str, int]], width: float) -> int:
    x, rows = 0.0, 1
    for name, _ in entries:
        wide = 34 + text_width(fit(name, min(220.0, width - 60)), 12.5) + 18
        if x > 0 and x + wide > width:
            x, rows = 0.0, rows + 1
        x += wide
    return rows


def curves(
    runs: Sequence[Curve], width: float, ident: str, *, title: str, x_title: str, x_form: Callable[[float], str],
    target: float | None = None,
) -> Markup | None:  # fmt: skip
    """One line per run, over steps or time; those of an approach share its mark. None without two points."""
    counts: dict[int, int] = {}
    drawn = []
    for run in runs:
        points = [(x, y if drawable(y) else None) for x, y in run.points if drawable(x)]
        counts[run.place] = counts.get(run.place, 0) + 1
        if counts[run.place] <= MOST_CURVES and sum(y is not None for _, y in points) > 0:
            drawn.append(run._replace(points=tuple(points)))
    values = [y for run in drawn for _, y in run.points if y is not None]
    places = [x for run in drawn for x, _ in run.points]
    if len(values) < 2 or max(places) - min(places) <= max(1e-12 * max(map(abs, places)), TINY):
        return None
    entries = list(dict.fromkeys((run.name, run.place) for run in drawn))
    narrow = width < 560
    left, right, bottom = (56.0 if narrow else 70.0), 10.0, 46.0
    top = 14.0 + 20 * _legend_rows(entries, width)
    height = top + (220.0 if narrow else 290.0) + bottom
    # A first value far above all others would flatten what matters.
    ordered = sorted(values)
    low, high = _range(ordered[: max(2, math.ceil(0.98 * len(ordered)))] if len(ordered) > 20 else ordered)
    low = min(low, ordered[0])
    if target is not None and drawable(target) and 3 * (high - low) > abs(target - low):
        low, high = min(low, target), max(high, target)
    xs, ys = Axis(min(places), max(places), left, width - right), Axis(low, high, height - bottom, top)
    ends = [f"{run.name} {_tick(last)}" for run in drawn
            if (last := next((y for _, y in reversed(run.points) if y is not None), None)) is not None]  # fmt: skip
    drawing = Drawing(width, height, title, f"Last values: {'; '.join(ends[:24])}.", ident)
    for tick in nice_ticks(low, high, 5):
        drawing.line(left, ys(tick), width - right, ys(tick), "grid")
        drawing.text(left - 8, ys(tick) + 4, _tick(tick), "small", "end")
    if target is not None and drawable(target) and low <= target <= high:
        drawing.line(left, ys(target), width - right, ys(target), "one")
        drawing.text(width - right, ys(target) - 6, f"target {_tick(target)}", "small", "end")
    for run in drawn:
        line = [(xs(x), None if y is None else ys(y)) for x, y in run.points]
        drawing.path(line, f"cmp {mark(run.place)}")
        for x, y in line if len(line) <= 12 else ():
            if y is not None:
                drawing.circle(x, y, 3, f"cmp-dot {mark(run.place)}")
    for tick in nice_ticks(xs.low, xs.high, 3 if narrow else 7):
        drawing.text(xs(tick), height - 25, x_form(tick), "small", "middle")
    drawing.text((left + width - right) / 2, height - 6, x_title, "small", "middle")
    _legend(drawing, entries, width)
    return drawing.markup()


def bars(panels: Sequence[Panel], width: float, ident: str) -> Markup | None:
    """Figures one below the other, a bar per approach from zero, with its interval over runs as a whisker."""
    shown = []
    for panel in panels:
        kept = tuple(bar for bar in panel.bars[:MOST_BARS] if drawable(bar.value))
        if kept:
            shown.append(panel._replace(bars=kept))
    if not shown:
        return None
    narrow = width < 560
    name_room, text_room = (88.0, 0.0) if narrow else (170.0, 250.0)
    row, gap, heading = (42.0 if narrow else 26.0), 18.0, 26.0
    height = sum(heading + row * len(panel.bars) + gap for panel in shown)
    desc = "; ".join(f"{panel.title}: {', '.join(f'{bar.name} {bar.text}' for bar in panel.bars)}" for panel in shown)
    drawing = Drawing(width, height, "Figures of the approaches with their intervals", desc[:4000], ident)
    y = 0.0
    for panel in shown:
        drawing.text(0, y + 16, fit(panel.title, width), "group")
        y += heading
        # Bars begin at zero, so that their lengths compare as the values do.
        ends = [end for bar in panel.bars for end in (bar.value, bar.low, bar.high) if drawable(end)]
        low, high = min(0.0, *(v for v in ends if v is not None)), max(0.0, *(v for v in ends if v is not None))
        axis = Axis(low, high if high - low > TINY else low + 1, name_room, width - text_room - 14)
        for bar in panel.bars:
            _bar(drawing, bar, axis, y, row, width, narrow=narrow)
            y += row
        y += gap
    return drawing.markup()


def _bar(drawing: Drawing, bar: Bar, axis: Axis, y: float, row: float, width: float, *, narrow: bool) -> None:
    middle = y + (28.0 if narrow else row / 2)
    zero, end = axis(0.0), axis(bar.value)
    drawing.text(0, middle + 4, fit(bar.name, axis.start - 12), "small")
    drawing.rect(min(zero, end), middle - 7, max(abs(end - zero), 1.5), 14, f"cmp-bar {mark(bar.place)}", 3, bar.text)
    if drawable(bar.low) and drawable(bar.high) and bar.low is not None and bar.high is not None:
        x1, x2 = axis(bar.low), axis(bar.high)
        drawing.line(x1, middle, x2, middle, "cmp-ci")
        for x in (x1, x2):
            drawing.line(x, middle - 5, x, middle + 5, "cmp-ci")
    if narrow:
        drawing.text(width, middle - 12, fit(bar.text, width - 8, 12.5), "small", "end")
    else:
        drawing.text(width, middle + 4, fit(bar.text, 244, 12.5), "small num", "end")


def scatter(
    spots: Sequence[Spot], width: float, ident: str, *, x_title: str, y_title: str, higher: bool,
    x_form: Callable[[float], str],
) -> Markup | None:  # fmt: skip
    """Performance over its price; the front is joined, and better is up. None for fewer than two approaches."""
    spots = [spot for spot in spots if drawable(spot.x) and drawable(spot.y)]
    if len(spots) < 2:
        return None
    narrow = width < 560
    left, right, top, bottom = (56.0 if narrow else 78.0), 20.0, 30.0, 46.0
    height = 260.0 if narrow else 330.0
    low, high = _range([spot.y for spot in spots])
    # Where lower is better the axis is turned, so that better is up in either case.
    span = (height - bottom, top) if higher else (top, height - bottom)
    ys = Axis(low, high, *span)
    xs = Axis(*_range([spot.x for spot in spots]), left, width - right)
    desc = "; ".join(spot.tip for spot in spots)
    drawing = Drawing(width, height, f"{y_title} against {x_title}", desc[:4000], ident)
    for tick in nice_ticks(ys.low, ys.high, 5):
        drawing.line(left, ys(tick), width - right, ys(tick), "grid")
        drawing.text(left - 8, ys(tick) + 4, _tick(tick), "small", "end")
    for tick in nice_ticks(xs.low, xs.high, 3 if narrow else 6):
        drawing.text(xs(tick), height - 25, x_form(tick), "small", "middle")
    front = sorted((spot for spot in spots if spot.front), key=lambda spot: spot.x)
    drawing.path([(xs(spot.x), ys(spot.y)) for spot in front], "cmp-front")
    for spot in spots:
        x, y = xs(spot.x), ys(spot.y)
        drawing.circle(x, y, 6, f"cmp-dot {mark(spot.place)}{'' if spot.front else ' hollow'}", spot.tip)
        side = "end" if x > (left + width - right) / 2 else "start"
        drawing.text(x + (-11 if side == "end" else 11), y - 8, fit(spot.name, width / 2 - 40), "small", side)
    drawing.text(left, 14, f"{y_title} (better is up)", "small")
    drawing.text((left + width - right) / 2, height - 6, x_title, "small", "middle")
    return drawing.markup()


def money(currency: str) -> Callable[[float], str]:
    """How a tick of a cost axis is told."""
    return lambda value: f"{_tick(value)} {words.clean(currency, 8)}"
