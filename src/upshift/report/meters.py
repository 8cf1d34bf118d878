"""Small drawings for one row of a terminal: a curve, shares of a whole with their legend, a bar with its figure.

They take the width they are given when they are drawn, and know a way to be drawn in plain ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement as Span
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from upshift.records.measurement import PHASE_TITLES
from upshift.report import words
from upshift.report.blocks import line as _text
from upshift.report.terminal import Bar

#: The width from which a curve has room beside its figure.
ROOMY = 56

#: Colour and fill of each phase; the fills tell neighbours apart without colour.
_PHASES = {
    "data": ("yellow", "░", "."), "h2d": ("bright_yellow", "▒", ":"), "forward": ("blue", "█", "#"),
    "loss": ("cyan", "▒", "-"), "backward": ("magenta", "▓", "="), "optimizer": ("green", "▚", "+"),
    "sync": ("red", "▞", "!"), "other": ("white", "░", "."),
}  # fmt: skip

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


class Spark:
    """A curve of one row over the width it is given; a gap where nothing is known."""

    def __init__(self, values: Sequence[float | None], style: str = "cyan", low: float | None = None) -> None:
        """
        Args:
            values: evenly spaced.
            low: what the lowest level stands for; None: the least of the values.
        """
        self.values, self.style, self.low = values, style, low

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = buckets(self.values, options.max_width)
        known = [value for value in columns if value is not None]
        levels = _ASCII_LEVELS if options.ascii_only else _LEVELS
        low = min(known if self.low is None else [self.low, *known], default=0.0)
        extent = max(known, default=0.0) - low
        drawn = ""
        for value in columns:
            share = (value - low) / extent if value is not None and extent > 0 else 0.0
            drawn += " " if value is None else levels[min(int(share * len(levels)), len(levels) - 1)]
        yield Segment(drawn.ljust(options.max_width), Style.parse(self.style))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Span:
        return Span(min(4, options.max_width), options.max_width)


class Stack:
    """Shares of a whole beside each other on one row."""

    def __init__(self, parts: Sequence[tuple[str, float]]) -> None:
        """
        Args:
            parts: (phase, share 0..1) in order.
        """
        self.parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, total = options.max_width, sum(share for _, share in self.parts)
        scale = width / max(total, 1.0)
        edge, reached = 0.0, 0
        for name, share in self.parts:
            edge += share * scale
            length = min(round(edge), width) - reached
            reached += max(length, 0)
            yield Segment(fill(name, options.ascii_only) * length, Style.parse(_PHASES.get(name, _PHASES["other"])[0]))
        yield Segment(" " * (width - reached))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Span:
        return Span(min(8, options.max_width), options.max_width)


class Legend:
    """The fill of each phase, its name and its share; what belongs together stays on one line."""

    def __init__(self, parts: Sequence[tuple[str, float]]) -> None:
        """
        Args:
            parts: (phase, share 0..1) in order.
        """
        self.parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(overflow="fold")
        for name, share in self.parts:
            told = f" {PHASE_TITLES.get(name, words.clean(name, 60))} {words.percent(round(share, 2))}"
            if line and line.cell_len + 3 + cell_len(told) > options.max_width:
                yield line
                line = Text(overflow="fold")
            line.append("  " if line else "")
            line.append(fill(name, options.ascii_only), style=_PHASES.get(name, _PHASES["other"])[0])
            line.append(told)
        yield line


class Meter:
    """A bar, its figure in words, and how it went lately where there is room."""

    def __init__(
        self, share: float | None, told: str, history: Sequence[float | None] = (), style: str = "cyan"
    ) -> None:
        self.share, self.told, self.history, self.style = share, told, history, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        roomy = options.max_width >= ROOMY
        row: list[RenderableType] = [Bar(self.share, self.style), _text(self.told)]
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=18 if roomy else 10)
        table.add_column(ratio=1, overflow="fold")
        if roomy and sum(value is not None for value in self.history) > 1:
            table.add_column(width=min(max(options.max_width // 4, 12), 40))
            row.append(Spark(self.history, self.style, low=0.0))
        table.add_row(*row)
        yield table


def buckets(values: Sequence[float | None], count: int) -> list[float | None]:
    """At most `count` means of neighbouring values; None where a bucket knows none."""
    if count <= 0:
        return []
    cuts = [round(place * len(values) / count) for place in range(count + 1)] if len(values) > count else None
    pieces = [[value] for value in values] if cuts is None else [values[a:b] for a, b in pairwise(cuts)]
    found: list[float | None] = []
    for piece in pieces:
        known = [value for value in piece if words.finite(value)]
        found.append(sum(value / len(known) for value in known) if known else None)
    return found


def fill(name: str, ascii_only: bool = False) -> str:
    """The character a phase is drawn with."""
    return _PHASES.get(name, _PHASES["other"])[2 if ascii_only else 1]
