"""Metrics that a script prints: heard beside its own streams, and told as numbers to the record.

What is replaced is the attribute `write` of the two stream objects themselves, so that everything else about them
(type, buffer, encoding, descriptor, buffering) stays as it was, and whatever writes through them is heard: print,
logging, progress bars, a tee. The script's own write comes first and its errors are its own. Not heard: other
processes, and what goes to a descriptor or to `.buffer` directly.

Between two windows only the newest lines of each kind are kept, a kind being what is left of a line without its
digits; lines are taken apart at the end of a window, and only names and numbers leave this process.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Characters of a piece of text, and of a line, that are looked at. Longer ones are no line of metrics.
MOST_TEXT, MOST_LINE = 65_536, 1000
#: Pieces of a line: `print` writes each of its arguments on its own.
MOST_PIECES = 200
#: Lines between two windows after which only one of so many is looked at.
MANY_LINES, ONE_OF = 500, 16
#: Kinds of lines between two tellings, and lines of a kind after an evaluation (else one: the newest).
MOST_KINDS, MOST_EACH = 64, 16
#: Lines taken apart at the end of a window, and the least time until the next, in times of what that took.
MOST_LINES, REST = 40, 200.0
#: Names that are followed.
MOST_NAMES = 200
#: Events after which all that is new at the end of a window goes into one.
MANY_EVENTS = 4000

#: What else a line holds does not tell one kind from another.
_NO_LETTERS = bytes(code for code in range(256) if not (chr(code).isalpha() and code < 128))
_NUMBERED = re.compile(r"\d|nan|inf")


class Line(NamedTuple):
    """A line, when it was complete: seconds since the process began, updates made, whether an evaluation was under
    way or just over."""

    at: float
    step: int
    evaluated: bool
    text: str


_Heard = tuple[float, int, bool, str]
"""A `Line` on its way: it takes a tenth of the time to make."""


class Printed:
    """Hears what is written to the standard streams of this process."""

    def __init__(self, watch: Watch) -> None:
        self.left_out = 0
        """Lines that were not looked at: too long, or too many."""
        self._watch = watch
        self._streams: list[tuple[Any, Any]] = []
        self._kinds: dict[tuple[bytes, bool], list[_Heard]] = {}
        self._known: set[str] = set()
        self._once: set[str] = set()
        self._told = 0
        self._heard = 0
        self._rest = -math.inf

    # -- listening ----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Listen to both streams of this process; a forked child is not heard."""
        self.look()
        os.register_at_fork(after_in_child=self.close)

    def look(self) -> None:
        """A window has ended. Listen to what stands for the streams now: a script may have opened them anew."""
        self._heard = 0
        for stream in (sys.__stdout__, sys.__stderr__, sys.stdout, sys.stderr):
            # No other type: what a tee writes on is heard where it arrives.
            if type(stream) is io.TextIOWrapper and "write" not in vars(stream) and _is_standard(stream):
                write = self._hearing(stream.write)
                stream.write = write  # type: ignore[method-assign]
                self._streams.append((stream, write))

    def close(self) -> None:
        """Stop listening; what the script has put in place of ours stays."""
        streams, self._streams = self._streams, []
        for stream, write in streams:
            if vars(stream).get("write") is write:
                del stream.write
        self._kinds = {}

    def _hearing(self, original: Callable[..., int]) -> Callable[..., int]:
        pieces: list[str] = []
        hear = self._hear

        def write(*args: Any) -> int:
            done = original(*args)
            try:
                text = args[0]
                if "\n" in text or "\r" in text:
                    hear(pieces, text)
                elif len(pieces) < MOST_PIECES:
                    pieces.append(text if len(text) <= MOST_LINE else text[: MOST_LINE + 1])
            except Exception:
                pieces.clear()  # nothing of ours may reach the script
            return done

        return write

    def _hear(self, pieces: list[str], text: str) -> None:
        """A piece of text with the end of a line in it."""
        if text == "\n":
            line = "".join(pieces)
            pieces.clear()
            self._complete(line)
            return
        if len(text) > MOST_TEXT:
            text = text[-MOST_TEXT:]
            self.left_out += 1
        # A progress bar begins anew with a carriage return.
        *lines, rest = text.replace("\r", "\n").split("\n")
        lines[0] = "".join(pieces) + lines[0]
        pieces.clear()
        for line in lines[-MOST_LINES:]:
            self._complete(line)
        self.left_out += max(len(lines) - MOST_LINES, 0)
        if rest:
            pieces.append(rest[: MOST_LINE + 1])

    def _complete(self, line: str) -> None:
        """Keep a line that may hold metrics. What is printed before the first update is how the script is set."""
        watch = self._watch
        evaluated = watch.span_start != 0.0
        if not (evaluated or watch.index) or not line:
            return
        self._heard += 1
        if self._heard > MANY_LINES and self._heard % ONE_OF:
            self.left_out += 1
            return
        if len(line) > MOST_LINE:
            self.left_out += 1
            return
        kind = (line.encode("ascii", "ignore").translate(None, _NO_LETTERS), evaluated)
        lines = self._kinds.get(kind)
        item = (time.perf_counter() - watch.born, watch.index, evaluated, line)
        if lines is None:
            if _NUMBERED.search(line) is None:
                return
            if len(self._kinds) < MOST_KINDS:
                self._kinds[kind] = [item]
            else:
                self.left_out += 1
        elif evaluated and len(lines) < MOST_EACH:
            lines.append(item)
        else:
            lines[-1] = item

    # -- telling ------------------------------------------------------------------------------------------------

    def due(self, at: float) -> bool:
        """Whether an evaluation may have been heard of, which is told at once."""
        return at >= self._rest and any(evaluated for _, evaluated in self._kinds)

    def tell(self, write: Callable[[Line, dict[str, float]], None], at: float, *, last: bool = False) -> None:
        """Hand over the metrics heard since the last time, in the order of their time.

        Args:
            write: told a line and its metrics; lines in the middle of training as one, with the newest of each name.
            at: seconds since the process began. Taking lines apart is put off where it has just cost much.
            last: the script has ended.
        """
        if not self._kinds or (at < self._rest and not last):
            return
        began = time.perf_counter()
        kinds, self._kinds = self._kinds, {}
        lines = sorted(Line(*item) for found in kinds.values() for item in found)
        # After an evaluation each line counts; in the middle of training the newest of each name is enough.
        self.left_out += max(len(lines) - MOST_LINES, 0)
        merged: dict[str, float] = {}
        newest: Line | None = None
        for item in _most(lines):
            values = self._metrics(item)
            if not values:
                continue
            if item.evaluated and self._told < MANY_EVENTS:
                self._told += 1
                write(item, values)
            else:
                merged.update(values)
                newest = item
        if newest is not None:
            self._told += 1
            write(newest, merged)
        self._rest = at + REST * (time.perf_counter() - began)

    def _metrics(self, line: Line) -> dict[str, float]:
        # Not before something is heard: the start of the run is the script's.
        from upshift.measure.metrics import direction
        from upshift.measure.printed import metrics_in

        if line.text.startswith("upshift:"):
            return {}
        found = {}
        known = self._watch.loss_seen
        for name, value in metrics_in(line.text, evaluated=line.evaluated, losses_known=known).items():
            if name in self._known:
                found[name] = value
            elif len(self._known) + len(self._once) >= MOST_NAMES and name not in self._once:
                self.left_out += 1
            elif direction(name) is not None or name in self._once:
                self._known.add(name)
                self._once.discard(name)
                found[name] = value
            else:
                self._once.add(name)
        return found


def _is_standard(stream: Any) -> bool:
    try:
        return stream.fileno() in (1, 2)
    except (OSError, ValueError):
        return False


def _most(lines: list[Line]) -> list[Line]:
    """Of many lines the newest, those after an evaluation first, in the order of their time."""
    if len(lines) <= MOST_LINES:
        return lines
    kept = sorted(lines, key=lambda item: (item.evaluated, item.at))[-MOST_LINES:]
    return sorted(kept)
