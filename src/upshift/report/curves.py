"""Charts of values over steps or time: losses of two arms, and any series. One with nothing to show is None."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from upshift.report import digest
from upshift.report.drawing import Axis, Drawing, drawable, nice_ticks, text_width


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


def thin(values: Sequence[float | None], most: int) -> list[int]:
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
        drawing.path([(xs(i + 1), ys(curve[i]) if drawable(curve[i]) else None) for i in thin(curve, 500)], cls)
    for line, cls in zip(smooth, ("curve stock", "curve planned"), strict=True):
        drawing.path([(xs(i + 1), None if (v := line[i]) is None else ys(v)) for i in thin(line, 360)], cls)
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
    places = [i for i in thin(difference, 240) if difference[i] is not None and scatter[i] is not None]
    drawing.area(
        [(xs(i + 1), ds((difference[i] or 0.0) + (scatter[i] or 0.0))) for i in places],
        [(xs(i + 1), ds((difference[i] or 0.0) - (scatter[i] or 0.0))) for i in places],
        "band",
    )
    drawing.line(left, ds(0), width - right, ds(0), "one")
    drawing.path(
        [(xs(i + 1), None if (v := difference[i]) is None else ds(v)) for i in thin(difference, 360)], "curve planned"
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
    kept = thin([y for _, y in points], 500)
    drawing.path([(xs(points[i][0]), ys(points[i][1])) for i in kept], "curve planned")
    _steps_axis(drawing, xs, height)
    return drawing.markup()
