"""Windows of steps, many at a time: read from JSON, and added up to fewer and wider ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from keyword import iskeyword
from operator import itemgetter, mul
from typing import Any

import msgspec

from upshift.records.run import Window

_read_windows = msgspec.json.Decoder(list[Window]).decode

#: More phases than any log names.
_MOST_PHASES = 32
#: Times that phases may change before windows are read with dictionaries only.
_MOST_MISSES = 16


class Reader:
    """Reads windows. Those that all name the same phases, as nearly all do, are read without a dictionary for each.

    What is read so looks like a `Window`, with a structure in the place of its dictionary: `whole` makes one of it.
    """

    def __init__(self) -> None:
        self._decode: Callable[[bytes], list[Window]] | None = None
        self._misses = 0

    def read(self, text: bytes) -> list[Window]:
        """The windows of a JSON array.

        Raises:
            msgspec.DecodeError: some are none.
        """
        if self._decode is not None:
            try:
                return self._decode(text)
            except msgspec.DecodeError:
                self._misses += 1
        windows = _read_windows(text)
        if self._misses < _MOST_MISSES:
            self._learn(windows[0].phases)
        else:
            self._decode = None
        return windows

    def _learn(self, phases: dict[str, float]) -> None:
        """Read windows with these phases from here on."""
        plain = all(name.isidentifier() and not name.startswith("_") and not iskeyword(name) for name in phases)
        if not plain or not 0 < len(phases) <= _MOST_PHASES:
            return
        inside = msgspec.defstruct("Phases", [(name, float) for name in phases], forbid_unknown_fields=True, gc=False)
        fields = [_field(item, inside) for item in msgspec.structs.fields(Window)]
        like = msgspec.defstruct("Lean", fields, forbid_unknown_fields=True, gc=False)
        self._decode = msgspec.json.Decoder(list[like]).decode  # type: ignore[valid-type]


def _field(item: msgspec.structs.FieldInfo, phases: type) -> Any:
    if item.name == "phases":
        return item.name, phases
    return (item.name, item.type) if item.required else (item.name, item.type, item.default)


def whole(window: Window) -> Window:
    """The window, with its phases in a dictionary."""
    if type(window) is Window:
        return window
    values = msgspec.structs.asdict(window)
    return Window(**{**values, "phases": msgspec.structs.asdict(values["phases"])})


def thin(windows: Sequence[Window]) -> list[Window]:
    """Merge neighbours two by two."""
    return [merged(windows[place : place + 2]) for place in range(0, len(windows), 2)]


def columns(windows: Sequence[Window]) -> list[tuple[Any, ...]]:
    """The fields of windows, each of all of them: summed much faster than window by window."""
    return list(zip(*map(msgspec.structs.astuple, windows), strict=True))


def merged(windows: Sequence[Window]) -> Window:
    """One window for several that follow each other; sums stay exact, losses are averaged by steps."""
    return windows[0] if len(windows) == 1 else added(*columns(windows))


def added(
    first: tuple[int, ...], n: tuple[int, ...], at: tuple[float, ...], seconds: tuple[float, ...],
    phases: tuple[dict[str, float], ...], loss: tuple[float | None, ...], last_loss: tuple[float | None, ...],
    evaluation: tuple[float, ...], checkpoint: tuple[float, ...],
) -> Window:  # fmt: skip
    """The same, from the fields of all of them."""
    known: Sequence[float | None] = loss
    weights: Sequence[int] = n
    if None in loss or min(n) < 1:
        known = [value for value in loss if value is not None]
        weights = [max(count, 1) for value, count in zip(loss, n, strict=True) if value is not None]
    weight = sum(weights)
    return Window(
        first=first[0],
        n=sum(n),
        at=at[-1],
        seconds=sum(seconds),
        phases=_summed(phases),
        loss=sum(map(mul, known, weights)) / weight if weight else None,
        last_loss=next((value for value in reversed(last_loss) if value is not None), None),
        evaluation=sum(evaluation),
        checkpoint=sum(checkpoint),
    )


def _summed(phases: Sequence[Any]) -> dict[str, float]:
    first = phases[0]
    if isinstance(first, msgspec.Struct):
        sums_of_fields = map(sum, zip(*map(msgspec.structs.astuple, phases), strict=True))
        return dict(zip(first.__struct_fields__, sums_of_fields, strict=True))
    names = tuple(first)
    # An itemgetter of one name gives no tuples.
    if len(names) > 1 and set(map(len, phases)) == {len(names)}:
        try:
            return dict(zip(names, map(sum, zip(*map(itemgetter(*names), phases), strict=True)), strict=True))
        except KeyError:
            pass
    sums: dict[str, float] = {}
    for item in phases:
        for name, value in item.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
