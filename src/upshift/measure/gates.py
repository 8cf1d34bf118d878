"""Limits that a later approach must keep against the first: `step>+2%`, for the gate of a pipeline.

With two runs or more of both, a limit is broken when the whole interval lies beyond it; a figure that is beyond with
an interval that is not is a warning. With one run of either there is no interval: the figure itself decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from upshift.errors import UsageError
from upshift.records.comparison import FIGURES, Approach, Comparison, Difference, Gate, Outcome

#: What may be named -> the figure it is.
NAMES = {
    "step": "step", "time": "time", "metric": "metric", "loss": "loss", "cost": "cost", "energy": "energy",
    "carbon": "carbon", "memory": "memory", "gpu-memory": "gpu_memory", "to-target": "to_target",
}  # fmt: skip

_UNITS = {
    "s": {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
    "B": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    "J": {"J": 1.0, "kJ": 1e3, "Wh": 3600.0, "kWh": 3.6e6},
    "g": {"g": 1.0, "kg": 1e3},
}
_FORM = re.compile(
    r"(?P<name>[a-z-]+)(?P<op>[<>])(?P<sign>[+-]?)(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)(?P<unit>%|[a-zA-Z]*)",
    re.ASCII,
)
_REMEDY = "Write NAME>LIMIT or NAME<LIMIT as in 'step>+2%', 'metric<-0.01' or 'time>2h'; NAME is one of {}."


class Limit(NamedTuple):
    """`kind`: `share` of the first, `change` from the first, or the `value` of the later approach itself."""

    text: str
    figure: str
    above: bool
    kind: str
    number: float


class _Held(NamedTuple):
    """What is held against a limit."""

    value: float
    low: float | None
    high: float | None


def parse(text: str) -> Limit:
    """A limit as written. With `%`: change as a share of the first. With a sign: change in the figure's unit.

    Raises:
        UsageError: it is none.
    """
    match = _FORM.fullmatch(re.sub(r"\s+", "", text))
    figure = NAMES.get(match["name"]) if match else None
    if match is None or figure is None:
        raise UsageError(f"{text!r} is not a limit.", remedy=_REMEDY.format(", ".join(NAMES)))
    number = float(match["number"]) * (-1.0 if match["sign"] == "-" else 1.0)
    unit = match["unit"]
    if unit == "%":
        number, kind = number / 100.0, "share"
    else:
        known = _UNITS.get(FIGURES[figure].unit, {})
        if unit and unit not in known:
            told = f"It is told in {', '.join(known)}." if known else "It takes no unit."
            raise UsageError(f"{text!r}: {match['name']} is not told in {unit!r}.", remedy=told)
        number, kind = number * (known[unit] if unit else 1.0), "change" if match["sign"] else "value"
    if not math.isfinite(number):
        raise UsageError(f"{text!r} is not a limit.", remedy=_REMEDY.format(", ".join(NAMES)))
    return Limit(text.strip(), figure, match["op"] == ">", kind, number)


def judge(found: Comparison, limits: Sequence[Limit], *, strict: bool = False) -> tuple[Gate, ...]:
    """Hold every later approach against every limit; `strict`: a figure beyond is enough, whatever its interval."""
    return tuple(
        _gate(found, limit, approach, strict) for limit in limits for approach in found.approaches[1:]
    )  # fmt: skip


def _gate(found: Comparison, limit: Limit, later: Approach, strict: bool) -> Gate:
    outcome, reason = _outcome(found, limit, later, strict)
    return Gate(limit.text, later.name, limit.figure, outcome, reason)


def _outcome(found: Comparison, limit: Limit, later: Approach, strict: bool) -> tuple[Outcome, str]:
    first = found.approaches[0]
    if limit.figure == "to_target":
        special = _missing_target(found, limit, first, later, strict)
        if special is not None:
            return special
    held = _held(found, limit, first, later)
    if isinstance(held, str):
        return "unknown", held
    beyond = held.value > limit.number if limit.above else held.value < limit.number
    shown = _text(limit, held.value)
    if held.low is None or held.high is None:
        told = f"{shown}, without an interval: one run of an approach"
        return ("failed" if beyond else "passed"), told
    told = f"{shown} ({_text(limit, held.low)} to {_text(limit, held.high)})"
    whole = held.low > limit.number if limit.above else held.high < limit.number
    if whole or (beyond and strict):
        return "failed", told
    return ("warned", f"{told}: beyond, but not shown") if beyond else ("passed", told)


def _missing_target(
    found: Comparison, limit: Limit, first: Approach, later: Approach, strict: bool
) -> tuple[Outcome, str] | None:
    """Where runs did not reach the target there is no time; None where all did."""
    if found.target is None:
        return "unknown", "no target was given (--target)"
    if later.reached is None or first.reached is None:
        return "unknown", "whether the target was reached is not known"
    ran, before = len(later.runs), len(first.runs)
    if limit.kind != "value" and first.reached < before:
        return "unknown", f"the target was reached by {first.reached} of {before} runs of {first.name}"
    if later.reached == ran:
        return None
    told = f"the target was reached by {later.reached} of {ran} runs of {later.name}"
    if not limit.above:
        return "passed", f"{told}: later than any time"
    all_of_them = later.reached == 0
    return ("failed" if all_of_them or strict else "warned"), told


def _held(found: Comparison, limit: Limit, first: Approach, later: Approach) -> _Held | str:
    """What is held against the limit, or why it is not known."""
    entry = later.figures.get(limit.figure)
    title = FIGURES[limit.figure].title
    if entry is None or entry.value.value is None:
        return f"the {title} of {later.name} is not known"
    if limit.kind == "value":
        value = entry.value
        alone = len(later.runs) < 2
        return _Held(entry.value.value, None if alone else value.low, None if alone else value.high)
    base = first.figures.get(limit.figure)
    if base is None or base.value.value is None:
        return f"the {title} of {first.name} is not known"
    if base.value.basis != entry.value.basis:
        return f"the {title} is {base.value.basis} of {first.name} and {entry.value.basis} of {later.name}"
    known = next((item for item in found.differences if (item.figure, item.approach) == (limit.figure, later.name)),
                 None)  # fmt: skip
    if known is None or known.change.value is None:
        return f"the difference of the {title} is not known"
    return _scaled(limit, known, base.value.value)


def _scaled(limit: Limit, known: Difference, base: float) -> _Held | str:
    """The change in the form of the limit; the first approach's own scatter is in the interval already."""
    change = known.change
    factor = 1.0
    if limit.kind == "share" and not known.relative:
        if base == 0:
            return "a share of zero is not known"
        factor = 1.0 / abs(base)
    elif limit.kind == "change" and known.relative:
        factor = base
    assert change.value is not None
    low, high = (None if end is None else end * factor for end in (change.low, change.high))
    return _Held(change.value * factor, low, high)


def _text(limit: Limit, value: float) -> str:
    return f"{value:+.3g}" if limit.kind == "change" else f"{value:.2%}" if limit.kind == "share" else f"{value:.4g}"
