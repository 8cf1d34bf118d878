"""What screens of a terminal are made of. Nothing in a text means markup, and every text is cleaned first."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from upshift.report import words


def line(text: object, style: str = "") -> Text:
    return Text(words.clean(text), style=style, overflow="fold")


def joined(parts: Iterable[str], style: str = "") -> Text:
    return line(" · ".join(part for part in parts if part), style)


def title(verb: str, script: str, arguments: tuple[str, ...]) -> Text:
    found = Text(f"upshift {verb}  ", style="bold", overflow="fold")
    found.append(words.command_text(script, arguments), style="cyan")
    return found


def head(text: str) -> Text:
    return Text(text, style="bold")


def indent(renderable: RenderableType, left: int = 2) -> Padding:
    return Padding(renderable, (0, 0, 0, left))


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Two columns: a name and what is known of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", overflow="fold", max_width=26)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(line(name), value if isinstance(value, Text) else line(value))
    return table


def grid(*columns: tuple[str, str], header: bool = True) -> Table:
    """A table without borders; columns as (title, justification)."""
    table = Table(box=None, show_header=header, header_style="dim", padding=(0, 1), pad_edge=False, expand=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table
