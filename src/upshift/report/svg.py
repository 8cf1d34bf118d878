"""The charts of a report of a search: anatomy of a step, forest of trials, roofline.

A chart that has nothing to show returns None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from upshift import units
from upshift.records.measurement import PHASE_TITLES, PHASES, Floor
from upshift.records.trial import Pairing
from upshift.report import words
from upshift.report.drawing import LIMIT, Axis, Drawing, drawable, fit, ratio_ticks, text_width


class Part(NamedTuple):
    """A piece of a bar: phase name, seconds, share shown on it."""

    name: str
    seconds: float
    label: str


class Bar(NamedTuple):
    """A bar of the anatomy: parts in order, the whole, and whether parts are known at all."""

    title: str
    total: float
    text: str
    parts: tuple[Part, ...] = ()
    highlight: bool = False


def phase_class(name: str) -> str:
    """CSS class of a phase's colour."""
    return f"p-{name}" if name in PHASES else "p-other"


def anatomy(bars: Sequence[Bar], width: float, ident: str) -> Markup | None:
    """Step times as horizontal bars on one time axis, split into phases where those are known."""
    bars = [bar for bar in bars if drawable(bar.total) and bar.total > 1e-12]
    if not bars:
        return None
    row, top, height = 74, 4, 32
    longest = max(bar.total for bar in bars)
    axis = Axis(0, longest, 0, width)
    desc = "; ".join(
        f"{bar.title}: {bar.text}"
        + "".join(f", {PHASE_TITLES.get(p.name, words.clean(p.name, 60))} {p.label}" for p in bar.parts)
        for bar in bars
    )
    drawing = Drawing(width, top + row * len(bars), "Where the time of a training step goes", desc, ident)
    for index, bar in enumerate(bars):
        y = top + index * row
        room = width - text_width(bar.text, 14) - 10
        drawing.text(0, y + 13, fit(bar.title, room, 14), "strong")
        drawing.text(width, y + 13, bar.text, "num", "end")
        y += 22
        end = axis(bar.total)
        if not bar.parts:
            drawing.rect(0, y, max(end, 3), height, "bar-kept" if bar.highlight else "bar-plain", 4, bar.text)
            continue
        drawing.rect(0, y, end, height, "bar-rest", 4, "not split further")
        x = 0.0
        known = sum(part.seconds for part in bar.parts)
        scale = bar.total / known if known > bar.total else 1.0
        for part in bar.parts:
            w = axis(part.seconds * scale) if drawable(part.seconds) and part.seconds > 0 else 0.0
            title = PHASE_TITLES.get(part.name, words.clean(part.name, 60))
            tip = f"{title}: {part.label}, {words.duration(part.seconds)}"
            drawing.rect(x, y, max(w - 1.5, 0.5 if w else 0), height, phase_class(part.name), 2, tip)
            if w > text_width(part.label, 12) + 12:
                drawing.text(x + w / 2 - 0.75, y + 20.5, part.label, f"on {phase_class(part.name)}-on", "middle")
            x += w
    return drawing.markup()


class Row(NamedTuple):
    """A row of the forest plot."""

    label: str
    detail: str
    pairing: Pairing
    kind: str  # kept | faster | slower | same
    confirmed: bool
    group: str = ""


def forest(rows: Sequence[Row], width: float, ident: str) -> Markup | None:
    """Ratios of step times with their bounds on a logarithmic axis; the line at 1 is the untouched script."""
    rows = [row for row in rows if words.finite(row.pairing.ratio) and row.pairing.ratio > 0]
    if not rows:
        return None
    narrow = width < 560
    left, right = (10.0, 10.0) if narrow else (min(290.0, width * 0.33), 208.0)
    step, heading = (62 if narrow else 46), 38
    top, bottom = 30, 46
    groups = sum(bool(row.group) and row.group != before for row, before in _with_group_before(rows))

    def bound(value: float, fallback: float) -> float:
        return min(max(value if words.finite(value) and value > 0 else fallback, 1 / 64), 64.0)

    ends = [bound(v, row.pairing.ratio) for row in rows for v in (row.pairing.low, row.pairing.high, row.pairing.ratio)]
    low, high = min(*ends, 1.0), max(*ends, 1.0)
    pad = max((high / low) ** 0.06, 1.01)
    axis = Axis(low / pad, high * pad, left, width - right, log=True)
    height = top + step * len(rows) + heading * groups + bottom
    desc = "; ".join(f"{row.group} {row.label}: {words.speedup_text(row.pairing)}".strip() for row in rows)
    drawing = Drawing(width, height, "Step time of the untouched script over that of each candidate", desc, ident)
    base = height - bottom
    one = axis(1.0)
    for tick in ratio_ticks(axis.low, axis.high, axis.end - axis.start):
        x = axis(tick)
        drawing.line(x, top - 6, x, base + 4, "grid")
        drawing.text(x, base + 20, f"{tick:.3g}x", "small", "middle")
    drawing.line(one, top - 10, one, base + 4, "one")
    if one - axis.start > 70 or not narrow:
        drawing.text(one - 8, top - 14, "slower", "small", "end")
    drawing.text(one + 8, top - 14, "faster", "small", "start")
    edge = float(top)
    for row, before in _with_group_before(rows):
        if row.group and row.group != before:
            drawing.text(0, edge + 24, row.group, "group")
            edge += heading
        y = edge + (44 if narrow else step / 2)
        edge += step
        pairing = row.pairing
        value = f"{words.ratio(pairing.ratio)}"
        bounds = f"{words.ratio(pairing.low)} to {words.ratio(pairing.high)}"
        if narrow:
            drawing.text(0, y - 22, fit(row.label, width - 160, 14), "strong")
            drawing.text(width, y - 22, f"{value}  ({bounds})", "num", "end")
        else:
            drawing.text(0, y - (3 if row.detail else -4), fit(row.label, left - 20, 14), "strong")
            if row.detail:
                drawing.text(0, y + 14, fit(row.detail, left - 20, 12), "small")
            drawing.text(width - right + 78, y + 4, value, f"num strong k-{row.kind}-text", "end")
            drawing.text(width, y + 4, bounds, "num small", "end")
        x1, x2 = axis(bound(pairing.low, pairing.ratio)), axis(bound(pairing.high, pairing.ratio))
        drawing.line(x1, y, x2, y, f"ci k-{row.kind}")
        for x in (x1, x2):
            drawing.line(x, y - 7, x, y + 7, f"ci k-{row.kind}")
        fill = "dot" if row.confirmed else "dot hollow"
        tip = f"{row.label}: {words.speedup_text(pairing)}"
        drawing.circle(axis(pairing.ratio), y, 4, f"{fill} k-{row.kind}", tip)
    caption = "times as fast (log scale)" if narrow else "step time of the reference ÷ step time of the candidate, log"
    drawing.text((axis.start + axis.end) / 2, height - 6, caption, "small", "middle")
    return drawing.markup()


def _with_group_before(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    return list(zip(rows, ["", *(row.group for row in rows[:-1])], strict=True))


def roofline(floor: Floor, step_seconds: float | None, width: float, ident: str) -> Markup | None:
    """Attained FLOP/s over arithmetic intensity, under the machine's measured roofs (Williams et al. 2009)."""
    flops, moved, band = floor.flops.value, floor.bytes_moved.value, floor.bandwidth.value
    quantities = (floor.flops, floor.bytes_moved, floor.bandwidth, floor.peak_flops)
    if not all(words.known(item) for item in quantities) or not words.finite(step_seconds):
        return None
    peak = floor.peak_flops.value
    assert flops is not None and moved is not None and band is not None and peak is not None
    if not all(1e-12 < value < LIMIT for value in (flops, moved, band, peak, step_seconds)):
        return None
    intensity, attained = flops / moved, flops / step_seconds
    roofs = [(floor.dtype, peak)]
    best = floor.best_peak_flops.value
    if words.known(floor.best_peak_flops) and best is not None and peak * 1.02 < best < LIMIT:
        roofs.append((floor.best_dtype, best))
    ridges = [value / band for _, value in roofs]
    x_low, x_high = min(intensity, *ridges) / 8, max(intensity, *ridges) * 8
    y_high = max(value for _, value in roofs) * 3
    y_low = min(attained / 4, y_high / 1000)
    narrow = width < 560
    left, right, bottom = (58.0 if narrow else 86.0), 12.0, 48.0
    top = 22.0 + 20 * len(roofs) if narrow else 14.0
    height = 310.0 if narrow else 380.0
    xs = Axis(x_low, x_high, left, width - right, log=True)
    ys = Axis(y_low, y_high, height - bottom, top, log=True)
    at = f"{units.si(words.three(attained), 'FLOP/s')} at {words.number(words.three(intensity))} FLOP per byte"
    of_roof = attained / min(peak, band * intensity)
    desc = (
        f"The step reaches {at}. Measured peak for {floor.dtype}: {words.quantity_text(floor.peak_flops)}; "
        f"memory bandwidth: {words.quantity_text(floor.bandwidth)}."
    )
    drawing = Drawing(width, height, "Roofline: this step against the machine's peaks", desc, ident)
    _decades(
        drawing, xs, ys, lambda x, v: drawing.text(x, height - 28, words.number(v), "small", "middle"), vertical=True
    )
    _decades(
        drawing, ys, xs, lambda y, v: drawing.text(left - 8, y + 4, units.si(v, ""), "small", "end"), vertical=False
    )
    drawing.text((left + width - right) / 2, height - 6, "FLOP per byte moved", "small", "middle")
    drawing.text(left + 6, top + 12, "FLOP/s", "small")
    for index, (dtype, value) in enumerate(roofs):
        ridge, start = value / band, max(x_low, y_low / band)
        style = "roof" if index == 0 else "roof second"
        drawing.path([(xs(start), ys(band * start)), (xs(ridge), ys(value)), (xs(x_high), ys(value))], style)
        name = f"{dtype} peak {units.si(words.three(value), 'FLOP/s')}"
        if narrow:
            drawing.line(left, 12 + 20 * index, left + 24, 12 + 20 * index, style)
            drawing.text(left + 32, 16 + 20 * index, fit(name, width - left - 36), "small")
        else:
            drawing.text(width - right - 4, ys(value) - 8, fit(name, width - right - xs(ridge) - 4), "small", "end")
    angle = -math.degrees(
        math.atan2(ys(y_low) - ys(y_low * 10), max(xs(x_low * 10) - xs(x_low), 1e-6))
    )  # a decade in x is a decade in y along the slope
    anchor = math.sqrt(max(x_low, y_low / band) * min(ridges))
    if abs(xs(min(ridges)) - xs(x_low)) > 150:
        name = f"memory {units.si(words.three(band), 'B/s')}"
        drawing.text(xs(anchor) - 6, ys(band * anchor) - 8, name, "small", "middle", turn=angle)
    x, y = xs(intensity), ys(attained)
    drawing.line(x, y, x, ys(min(band * intensity, peak)), "drop")
    drawing.circle(x, y, 7, "dot k-kept", at)
    label = f"this step: {units.si(words.three(attained), 'FLOP/s')}"
    below = f"{words.percent(of_roof)} of the roof above it"
    side = "end" if x > width * 0.55 else "start"
    shift, drop = (-14.0 if side == "end" else 14.0), 0.0
    if narrow:
        half = text_width(label, 14) / 2
        side, shift, drop = "middle", min(max(x, left + half + 4), width - half) - x, 24.0
    drawing.text(x + shift, y + drop + 1, label, "strong", side)
    drawing.text(x + shift, y + drop + 18, below, "small", side)
    return drawing.markup()


def _decades(
    drawing: Drawing, axis: Axis, across: Axis, label: Callable[[float, float], None], *, vertical: bool
) -> None:
    """Grid lines at powers of ten, thinned so that labels do not touch."""
    first, last = math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9)
    room = abs(axis.end - axis.start) / max(last - first, 1)
    stride = max(1, math.ceil((58 if vertical else 26) / max(room, 1e-6)))
    for power in range(first, last + 1):
        if power % stride:
            continue
        place = axis(10.0**power)
        if vertical:
            drawing.line(place, across.start, place, across.end, "grid")
        else:
            drawing.line(across.start, place, across.end, place, "grid")
        label(place, 10.0**power)
