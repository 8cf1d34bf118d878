"""A verification as one screen of a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from upshift.records.verification import Interval, Verification
from upshift.report import words
from upshift.report.blocks import facts, grid, line, title
from upshift.report.sentences import energy_text

_STYLES = {"as good": "bold green", "worse": "bold red", "not shown": "bold yellow"}


def render_verify(found: Verification) -> RenderableType:
    """What whole runs say about the metric, the time to target and the time of a run."""
    return Group(
        title("verify", found.script, found.arguments), Text(), whole_runs(found), Text(),
        line(_verdict(found), _STYLES[found.answer]), line(found.reason),
    )  # fmt: skip


def whole_runs(found: Verification) -> RenderableType:
    """The figures of the runs, without the answer."""
    better = "higher" if found.mode == "max" else "lower"
    rows = [
        ("metric", f"{words.clean(found.metric, 80)} ({better} is better), {found.take} value of each run"),
        ("margin", f"{words.number(found.margin)} ({found.margin_note})"),
        ("difference", f"{_interval(found.difference)}, above zero is better"),
        ("seed spread", words.number(found.seed_spread)),
        ("faster" if found.energy is None else "time", times(found.speedup, "whole run, start-up included")),
        ("to target", _target(found)),
    ]
    if found.energy is not None:
        rows.append(("energy", energy_text(found.energy)))
    if found.price is not None:
        rows.append(("cost", _cost(found)))
    table = grid(("", ""), ("stock", "right"), ("plan", "right"))
    table.add_row(line("metric", "dim"), line(_interval(found.stock)), line(_interval(found.plan)))
    for label, take in (("seconds", "seconds"), ("steps", "steps")):
        cells = [_middle([getattr(run, take) for run in found.runs if run.arm == arm]) for arm in ("stock", "plan")]
        table.add_row(line(label, "dim"), *map(line, cells))
    parts: list[RenderableType] = [table, Text(), facts(rows)]
    for run in found.runs:
        for note in run.notes:
            parts.append(line(f"{run.arm}, seed {run.seed}: {note}", "yellow"))
    return Group(*parts)


def _verdict(found: Verification) -> str:
    plan = " + ".join(found.techniques) or "the plan"
    n = found.difference.n if found.difference is not None else 0
    if found.answer == "as good":
        return f"{plan}: as good on {words.clean(found.metric, 80)}, over {n} seeds."
    if found.answer == "worse":
        return f"{plan}: worse on {words.clean(found.metric, 80)}. Keep your baseline."
    return f"{plan}: not shown to be as good on {words.clean(found.metric, 80)}, over {n} seeds."


def _interval(found: Interval | None) -> str:
    if found is None or found.mean is None:
        return words.UNKNOWN
    if found.low is None or found.high is None:
        return f"{words.number(found.mean)} (one run, no interval)"
    return f"{words.number(found.mean)} ({words.number(found.low)} to {words.number(found.high)})"


def times(found: Interval | None, what: str) -> str:
    """A ratio of times with its bounds: `1.31x (1.12x to 1.52x at 95 %), time to target, 3 pairs`."""
    if found is None or found.mean is None:
        return words.UNKNOWN
    bounds = ""
    if found.low is not None and found.high is not None:
        bounds = f" ({words.ratio(found.low)} to {words.ratio(found.high)} at {words.percent(found.level)})"
    return f"{words.ratio(found.mean)}{bounds}, {what}, {found.n} pairs"


def _target(found: Verification) -> str:
    if found.target is None:
        return "no target was given (--target)"
    stock, plan = found.reached
    pairs = found.speedup.n if found.speedup is not None else 0
    reached = f"{words.number(found.target)} reached by {stock} of {pairs} stock and {plan} of {pairs} planned runs"
    if found.target_speedup is None:
        return f"{reached}; the ratio of times is {words.UNKNOWN}"
    return f"{times(found.target_speedup, 'time to target')}; {reached}"


def _cost(found: Verification) -> str:
    assert found.price is not None
    each = []
    for arm in ("stock", "plan"):
        seconds = [run.seconds for run in found.runs if run.arm == arm]
        mean = sum(seconds) / len(seconds) * found.price / 3600 if seconds else None
        each.append(f"{arm} {words.number(mean)}")
    return f"{', '.join(each)} a run at {words.number(found.price)} an hour (estimated from the time)"


def _middle(values: list[float]) -> str:
    if not values:
        return words.UNKNOWN
    ordered = sorted(values)
    return f"{words.number(ordered[len(ordered) // 2])} (n={len(ordered)})"
