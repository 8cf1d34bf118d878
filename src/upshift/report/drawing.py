"""Shapes, text and axes of hand-drawn SVG: no script, no style attribute, colours by class from the page's style sheet.

A drawing takes the width it is made for, so that text keeps its size on a phone, and an `ident` that makes its ids
unique on the page. All text is escaped here.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from upshift.report import words

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
