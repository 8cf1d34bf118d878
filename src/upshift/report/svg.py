"""Hand-drawn charts as inline SVG: no script, no style attribute, colours by class from the page's style sheet.

Every chart takes the width it is drawn for, so that text keeps its size on a phone, and an `ident` that makes its
ids unique on the page. All text is escaped here. A chart that has nothing to show returns None.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from upshift import units
from upshift.records.measurement import PHASE_TITLES, PHASES, Floor
from upshift.records.trial import Pairing
from upshift.report import digest, words

#: Magnitudes beyond this are left out of a drawing (they stay in the tables).
LIMIT = 1e30

Points = Sequence[tuple[float, float | None]]


def drawable(value: float | None) -> bool:
    """Whether a value can be placed on a linear axis."""
    return words.finite(value) and abs(value) < LIMIT


def text_width(text: str, size: float = 13) -> float:
    """Estimated width in px: there is no font to measure here, so it errs to the wide side."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return size * (0.56 * (len(text) - wide) + 1.05 * wide)


def fit(text: str, room: float, size: float = 13) -> str:
    """The text, cut with an ellipsis where it would not fit into `room` px."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text.rstrip() + "…"


class Drawing:
    """One SVG with title and description; coordinates in px."""

    def __init__(self, width: float, height: float, title: str, desc: str, ident: str) -> None:
        self.width, self.height, self.ident = width, height, ident
        self._parts = [
            f'<title id="{ident}-t">{escape(words.clean(title))}</title>',
            f'<desc id="{ident}-d">{escape(words.clean(desc))}</desc>',
        ]

    def rect(self, x: float, y: float, w: float, h: float, cls: str, rx: float = 0, tip: str = "") -> None:
        """A rectangle, with a tooltip."""
        shape = f'<rect class="{cls}" x="{x:.2f}" y="{y:.2f}" width="{max(w, 0):.2f}" height="{max(h, 0):.2f}"'
        self._close(f'{shape} rx="{rx:g}"' if rx else shape, "rect", tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        """A straight line."""
        self._parts.append(f'<line class="{cls}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>')

    def circle(self, x: float, y: float, r: float, cls: str, tip: str = "") -> None:
        """A dot, with a tooltip."""
        self._close(f'<circle class="{cls}" cx="{x:.2f}" cy="{y:.2f}" r="{r:g}"', "circle", tip)

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start", turn: float = 0) -> None:
        """A line of text; `turn` in degrees about its anchor."""
        names = f"t {cls}".strip()
        extra = f' transform="rotate({turn:.2f} {x:.2f} {y:.2f})"' if turn else ""
        shown = escape(words.clean(text))
        self._parts.append(
            f'<text class="{names}" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"{extra}>{shown}</text>'
        )

    def path(self, points: Points, cls: str) -> None:
        """A polyline that breaks where a y is None."""
        commands: list[str] = []
        pen = "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            commands.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        if commands:
            self._parts.append(f'<path class="{cls}" d="{"".join(commands)}"/>')

    def area(self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], cls: str) -> None:
        """The surface between two lines."""
        if len(upper) > 1:
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
            self._parts.append(f'<polygon class="{cls}" points="{corners}"/>')

    def _close(self, shape: str, tag: str, tip: str) -> None:
        inner = f"><title>{escape(words.clean(tip))}</title></{tag}>" if tip else "/>"
        self._parts.append(shape + inner)

    def markup(self, cls: str = "") -> Markup:
        """The finished element."""
        head = (
            f'<svg class="{f"chart {cls}".strip()}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" '
            f'aria-labelledby="{self.ident}-t {self.ident}-d">'
        )
        return Markup(head + "".join(self._parts) + "</svg>")


class Axis(NamedTuple):
    """Maps [low, high] to [start, end] px, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside is drawn at the edge."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, 1e-300)), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if not 0 <= last - first <= 50:
        return [low, high]
    return [index * step for index in range(first, last + 1)]


def ratio_ticks(low: float, high: float, room: float = 600) -> list[float]:
    """Ticks of a logarithmic axis of ratios, always with 1: even steps where it is short, powers of two where not."""
    most = max(4, min(9, int(room / 46)))
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most and high / low < 8:
            return [round(index * step, 2) for index in range(first, last + 1)]
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    return [2.0**power for power in range(first, last + 1) if power % stride == 0]


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


class Frame(NamedTuple):
    """A plotting area with its two axes."""

    xs: Axis
    ys: Axis


def _frame(drawing: Drawing, xs: Axis, ys: Axis, *, ticks: int, form: Callable[[float], str]) -> Frame:
    for tick in nice_ticks(ys.low, ys.high, ticks):
        y = ys(tick)
        drawing.line(xs.start, y, xs.end, y, "grid")
        drawing.text(xs.start - 8, y + 4, form(tick), "small", "end")
    return Frame(xs, ys)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A range with some air around the values, never empty."""
    low, high = min(values), max(values)
    air = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-9)
    return low - air, high + air


def _thin(values: Sequence[float | None], most: int) -> list[int]:
    """Indices to draw: all, or the extremes of each bucket, so that spikes stay visible."""
    if len(values) <= most:
        return list(range(len(values)))
    size = math.ceil(2 * len(values) / most)
    kept: list[int] = []
    for start in range(0, len(values), size):
        bucket = range(start, min(start + size, len(values)))
        numbers = [i for i in bucket if drawable(values[i])]
        low = min(numbers, key=lambda i: values[i] or 0.0, default=start)
        high = max(numbers, key=lambda i: values[i] or 0.0, default=start)
        kept.extend(sorted({low, high}))
    return kept


def _tick_text(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def losses(stock: Sequence[float], planned: Sequence[float], width: float, ident: str) -> Markup | None:
    """Both loss curves, smoothed over raw, and below them the smoothed difference planned - stock.

    The band is one standard deviation of the step-by-step differences within the smoothing window: it describes
    the scatter, it is not a confidence interval.
    """
    steps = min(len(stock), len(planned))
    stock, planned = stock[:steps], planned[:steps]
    shown = [v for v in (*stock, *planned) if drawable(v)]
    if steps < 2 or not shown:
        return None
    window = smoothing(steps)
    clean = [[v if drawable(v) else math.nan for v in curve] for curve in (stock, planned)]
    smooth = [digest.smooth(curve, window) for curve in clean]
    gaps = [b - a for a, b in zip(*clean, strict=True)]
    difference, scatter = digest.smooth(gaps, window), digest.spread(gaps, window)
    narrow = width < 560
    left, right, top = (46.0 if narrow else 64.0), 8.0, 30.0
    upper, gap, lower, bottom = (200.0, 40.0, 100.0, 42.0) if narrow else (270.0, 44.0, 120.0, 42.0)
    height = top + upper + gap + lower + bottom
    xs = Axis(1, steps, left, width - right)
    bad = sum(not drawable(v) for v in (*stock, *planned))
    desc = (
        f"Loss of the untouched script and of the plan over {steps:,} paired steps, smoothed over {window} steps. "
        f"{f'{bad} values were not finite. ' if bad else ''}"
        f"Last smoothed values: stock {_last(smooth[0])}, planned {_last(smooth[1])}."
    )
    drawing = Drawing(width, height, "Training loss, untouched against planned", desc, ident)
    # Rare raw spikes that tower over the smoothed curves are drawn at the edge, so as not to flatten these.
    smoothed = [v for curve in smooth for v in curve if v is not None]
    low, high = _span(smoothed) if smoothed else _span(shown)
    inside = sorted(shown)
    rare = len(inside) // 100 if inside[-1] - inside[0] > 2 * (high - low) else 0
    low, high = min(low, inside[rare]), max(high, inside[-1 - rare])
    ys = Axis(low, high, top + upper, top)
    _frame(drawing, xs, ys, ticks=5, form=_tick_text)
    for curve, cls in zip(clean, ("raw stock", "raw planned"), strict=True):
        drawing.path([(xs(i + 1), ys(curve[i]) if drawable(curve[i]) else None) for i in _thin(curve, 500)], cls)
    for line, cls in zip(smooth, ("curve stock", "curve planned"), strict=True):
        drawing.path([(xs(i + 1), None if (v := line[i]) is None else ys(v)) for i in _thin(line, 360)], cls)
    for i in range(steps):
        if not (drawable(stock[i]) and drawable(planned[i])):
            drawing.line(xs(i + 1), top, xs(i + 1), top + 8, "bad")
    _legend(drawing, left, [("stock", "stock"), ("planned", "with the plan")])
    start = top + upper + gap
    drawing.text(left, start - 10, "difference, planned - stock", "small")
    reach = [abs(d) + (s or 0.0) for d, s in zip(difference, scatter, strict=True) if d is not None]
    most = max(reach, default=0.0) or 1e-9
    ds = Axis(-1.1 * most, 1.1 * most, start + lower, start)
    _frame(drawing, xs, ds, ticks=4, form=_tick_text)
    places = [i for i in _thin(difference, 240) if difference[i] is not None and scatter[i] is not None]
    drawing.area(
        [(xs(i + 1), ds((difference[i] or 0.0) + (scatter[i] or 0.0))) for i in places],
        [(xs(i + 1), ds((difference[i] or 0.0) - (scatter[i] or 0.0))) for i in places],
        "band",
    )
    drawing.line(left, ds(0), width - right, ds(0), "one")
    drawing.path(
        [(xs(i + 1), None if (v := difference[i]) is None else ds(v)) for i in _thin(difference, 360)], "curve planned"
    )
    _steps_axis(drawing, xs, height)
    return drawing.markup()


def smoothing(steps: int) -> int:
    """Width of the moving mean for so many steps, odd."""
    return max(3, min(steps // 16, 101)) | 1


def _last(values: Sequence[float | None]) -> str:
    return next((f"{value:.4g}" for value in reversed(values) if value is not None), "unknown")


def _legend(drawing: Drawing, left: float, entries: Sequence[tuple[str, str]]) -> None:
    x = left
    for cls, label in entries:
        drawing.line(x, 13, x + 22, 13, f"curve {cls}")
        drawing.text(x + 29, 17, label, "small")
        x += 29 + text_width(label, 12.5) + 22


def _steps_axis(drawing: Drawing, xs: Axis, height: float) -> None:
    for tick in nice_ticks(xs.low, xs.high, 4 if drawing.width < 560 else 8):
        drawing.text(xs(tick), height - 23, f"{tick:,.0f}", "small", "middle")
    drawing.text((xs.start + xs.end) / 2, height - 5, "step", "small", "middle")


def series(
    points: Sequence[tuple[float, float]],
    width: float,
    ident: str,
    *,
    title: str,
    form: Callable[[float], str] = _tick_text,
    from_zero: bool = False,
) -> Markup | None:
    """One figure over the steps of a run."""
    points = [(x, y) for x, y in points if drawable(x) and drawable(y)]
    if len(points) < 2:
        return None
    narrow = width < 560
    left, right, top, bottom = (64.0 if narrow else 76.0), 8.0, 12.0, 42.0
    height = 210.0 if narrow else 250.0
    low, high = _span([y for _, y in points])
    low = 0.0 if from_zero and low >= -abs(high) and min(y for _, y in points) >= 0 else low
    steps = [x for x, _ in points]
    xs = Axis(min(steps), max(steps), left, width - right)
    ys = Axis(low, high, height - bottom, top)
    desc = f"From {form(points[0][1])} at step {points[0][0]:,.0f} to {form(points[-1][1])} at {points[-1][0]:,.0f}."
    drawing = Drawing(width, height, title, desc, ident)
    _frame(drawing, xs, ys, ticks=4, form=form)
    kept = _thin([y for _, y in points], 500)
    drawing.path([(xs(points[i][0]), ys(points[i][1])) for i in kept], "curve planned")
    _steps_axis(drawing, xs, height)
    return drawing.markup()
