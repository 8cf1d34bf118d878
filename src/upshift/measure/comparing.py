"""Approaches against the first one: every figure with its interval over runs, and which differences are shown.

A difference is judged where both approaches have three runs or more. Times, and what follows from them, need runs that
took turns on one machine: made one approach after the other, a drift of the machine looks like a difference. What is
not judged is still shown, without a claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from upshift.errors import UsageError
from upshift.measure import groups, perrun, series
from upshift.measure.groups import Gap
from upshift.measure.perrun import Common, Figures, Seen, Value
from upshift.measure.series import Choice
from upshift.records.comparison import FIGURES, Answer, Approach, Comparison, Difference, Figure, Line, Mode, Point
from upshift.records.ledger import Entry
from upshift.records.quantity import Basis, Quantity, unknown
from upshift.records.run import Run

#: Points of a curve that are kept for drawing.
MOST_POINTS = 200
#: Runs of each approach from which on a difference may be called one: two that agree by chance are too common.
LEAST_RUNS = 3
#: Figures that are the same in every run by their nature.
REPEATS = ("memory", "gpu_memory")
#: Corrected p-value below which a difference counts as shown.
ALPHA = 0.05

TAKE_TURNS = "the runs did not take turns, so that a drift of the machine would look the same"


class Group(NamedTuple):
    """The runs of one approach."""

    name: str
    runs: tuple[Seen, ...]


def compare(
    given: Sequence[Group], *, created: str, metric: str | None = None, target: float | None = None,
    notes: Sequence[str] = (),
) -> Comparison:  # fmt: skip
    """Compare every later approach with the first.

    Args:
        given: at least two approaches, each with a run or more.
        created: the time of the comparison, ISO 8601.
        metric: as `NAME[:max|:min]`; None: one that all runs have, else the training loss.
        target: value of the metric whose first time is compared.
        notes: what the reader of the records had to say.

    Raises:
        UsageError: fewer than two approaches, or a metric that cannot be found.
    """
    if len(given) < 2 or not all(group.runs for group in given):
        raise UsageError("a comparison needs two runs or more.", remedy="upshift compare RUN RUN [RUN ...]")
    runs = [item for group in given for item in group.runs]
    choice = series.choose([item.metrics for item in runs], metric, any(map(_has_loss, runs)))
    if target is not None and not choice.name:
        raise UsageError("there is no metric that could reach a target.", remedy="Name one with --metric.")
    until = perrun.common(runs)
    names = iter(choice.names)
    lossy = choice.name == series.LOSS
    found: list[list[Figures]] = []
    for group in given:
        found.append([])
        for item in group.runs:
            name = next(names)
            seen = perrun.figures(item, name, choice.mode, target, until)
            # Without the metric a run has no performance: its training loss must not pass for one.
            found[-1].append(seen if name or lossy else _without_metric(seen))
    basis = _efficiency(found, choice)
    currency = next((item.ledger.currency for item in runs if item.ledger is not None), "USD")
    told = [*notes, *_remarks(given, found, choice, until)]
    # Money of several currencies is not added or compared.
    if len({item.ledger.currency for item in runs if item.ledger is not None}) > 1:
        _drop(found, ("cost", "cost_per_epoch", "efficiency"))
        told.append("The runs are priced in several currencies: cost is not compared.")
    approaches = [_approach(group, figures, choice, target) for group, figures in zip(given, found, strict=True)]
    differences = _differences(approaches, found, choice.mode)
    return Comparison(
        created=created, metric=choice.name, mode=choice.mode, metric_note=choice.note,
        approaches=tuple(_with_fronts(approaches, choice.mode)), differences=tuple(differences),
        metrics=choice.shared, target=target, currency=currency, common_step=until.step, common_time=until.time,
        efficiency=basis, notes=tuple(told),
    )  # fmt: skip


def _has_loss(seen: Seen) -> bool:
    return bool(series.losses(seen.run))


def _drop(found: Sequence[Sequence[Figures]], names: Sequence[str]) -> None:
    for figures in (item for group in found for item in group):
        for name in names:
            figures.values.pop(name, None)


def _without_metric(seen: Figures) -> Figures:
    gone = ("metric", "best", "at_step", "at_time", "to_target", "steps_to_target")
    return Figures({name: value for name, value in seen.values.items() if name not in gone}, (), seen.notes)


def _efficiency(found: Sequence[Sequence[Figures]], choice: Choice) -> str:
    """Performance per cost of every run, or per compute hour where no price is known; what it is, in words."""
    every = [item.values for group in found for item in group]
    per = next((name for name in ("cost", "hours", "time") if all(name in item for item in every)), "")
    if not choice.name or not per:
        return ""
    for item in every:
        top, below = item.get("metric"), item[per]
        if top is None or not math.isfinite(top.value) or below.value <= 0 or top.value <= 0:
            continue
        value = top.value / below.value if choice.mode == "max" else 1 / top.value / below.value
        if not 1e-100 < value < series.LIMIT:
            continue
        basis: Basis = below.entry.value.basis
        item["efficiency"] = Value(value, Entry(Quantity(value, "", n=1, basis=basis)))
    below_line = {"cost": "cost", "hours": "compute hour", "time": "second"}[per]
    if choice.mode == "max":
        return f"{choice.name} / {below_line}"
    return f"1 / ({choice.name} x {below_line}), as a lower {choice.name} is better"


# ------------------------------------------------------------------------------------------------- approaches


def _approach(group: Group, found: Sequence[Figures], choice: Choice, target: float | None) -> Approach:
    lines = []
    for seen, figures in zip(group.runs, found, strict=True):
        values = {name: item.value if math.isfinite(item.value) else None for name, item in figures.values.items()}
        notes = list(figures.notes)
        if seen.run.torn_lines:
            notes.append(f"{seen.run.torn_lines:,} lines of its log could not be read")
        lines.append(Line(
            run=seen.place or seen.run.id, status=seen.run.status, started=seen.run.started,
            machine=machine(seen.run), steps=int(perrun.last_step(seen) or 0), figures=values,
            metric=thin(figures.points), loss=thin(series.losses(seen.run)), notes=tuple(notes),
        ))  # fmt: skip
    first = group.runs[0].run
    reached = None
    if target is not None and choice.name:
        reached = sum(math.isfinite(item.values["steps_to_target"].value) if "steps_to_target" in item.values
                      else "to_target" in item.values and math.isfinite(item.values["to_target"].value)
                      for item in found)  # fmt: skip
    return Approach(
        name=group.name, runs=tuple(lines), script=" ".join((first.script, *first.arguments)),
        techniques=first.techniques, machines=tuple(dict.fromkeys(line.machine for line in lines if line.machine)),
        figures={name: entry for name in FIGURES if (entry := _over_runs(name, found)) is not None},
        phases=_phases(group), reached=reached,
    )  # fmt: skip


def _phases(group: Group) -> dict[str, float]:
    """Seconds of a step per phase, mean over runs."""
    found: dict[str, list[float]] = {}
    for seen in group.runs:
        for name, seconds in series.phase_seconds(seen.run).items():
            found.setdefault(name, []).append(seconds)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def machine(run: Run) -> str:
    """The device a run was made on, in words; empty where the record does not say it."""
    return run.environment.get("device") or run.environment.get("gpu") or run.environment.get("cpu", "")


def thin(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most `MOST_POINTS` points, evenly picked, the last among them."""
    if len(points) <= MOST_POINTS:
        return tuple(points)
    share = (len(points) - 1) / (MOST_POINTS - 1)
    return tuple(points[round(at * share)] for at in range(MOST_POINTS))


def _over_runs(name: str, found: Sequence[Figures]) -> Entry | None:
    """The middle of a figure over the runs that know it; None where none does."""
    known = [item.values[name] for item in found if name in item.values]
    if not known:
        return None
    figure = FIGURES[name]
    values = [item.value for item in known]
    basis = _basis(known)
    unit = figure.unit or known[0].entry.value.unit
    quantity = groups.middle(values, unit, figure.scale, basis)
    missing = sum(not math.isfinite(value) for value in values)
    how = list(dict.fromkeys(item.entry.how for item in known if item.entry.how))[:1]
    if missing:
        kind = "not reached" if "target" in name else "not finite"
        how = [f"{kind}" if len(values) == 1 else f"median; {kind} in {missing} of {len(values)} runs: worse than any"]
    elif len(known) == 1:
        # The uncertainty of how the figure is known is no scatter over runs, but it is all there is.
        own = known[0].entry.value
        quantity = replace(quantity, low=own.low, high=own.high)
    elif basis == "estimated":
        quantity = _wider(quantity, known)
    if len(known) < len(found):
        how.append(f"known of {len(known)} of {len(found)} runs")
    return Entry(quantity, "; ".join(how))


def _wider(quantity: Quantity, known: Sequence[Value]) -> Quantity:
    """The interval over runs, widened to the mean bounds of the estimates: an error of the method repeats in each."""
    lows, highs = ([getattr(item.entry.value, end) for item in known] for end in ("low", "high"))
    if quantity.low is None or quantity.high is None or None in lows or None in highs:
        return quantity
    return replace(quantity, low=min(quantity.low, math.fsum(lows) / len(lows)),
                   high=max(quantity.high, math.fsum(highs) / len(highs)))  # fmt: skip


def _basis(known: Sequence[Value]) -> Basis:
    """The weakest of what the values rest on."""
    found = {item.entry.value.basis for item in known}
    return "estimated" if "estimated" in found else "measured"


def _with_fronts(approaches: Sequence[Approach], mode: Mode) -> list[Approach]:
    """Mark those that no other approach beats at performance and cost (or time) together, by their middles."""
    result = list(approaches)
    for name in ("cost", "time"):
        placed = [(at, point) for at, item in enumerate(approaches) if (point := _place(item, name, mode)) is not None]
        for at, (better, less) in placed if len(placed) > 1 else ():
            beaten = any(b >= better and c <= less and (b > better or c < less) for _, (b, c) in placed)
            if not beaten:
                result[at] = replace(result[at], front=(*result[at].front, name))
    return result


def _place(approach: Approach, name: str, mode: Mode) -> tuple[float, float] | None:
    performance, price = (approach.figures[key].value.value if key in approach.figures else None
                          for key in ("metric", name))  # fmt: skip
    if performance is None or price is None:
        return None
    return (performance if mode == "max" else -performance), price


# ------------------------------------------------------------------------------------------------- differences


class _Pair(NamedTuple):
    """A figure of two approaches on its way to a difference."""

    name: str
    figure: Figure
    first: Approach
    later: Approach
    a: list[Value]
    b: list[Value]
    gap: Gap


def _differences(approaches: Sequence[Approach], found: Sequence[Sequence[Figures]], mode: Mode) -> list[Difference]:
    pairs = []
    for at in range(1, len(approaches)):
        for name, figure in FIGURES.items():
            a, b = ([item.values[name] for item in found[place] if name in item.values] for place in (0, at))
            if a or b:
                first, later = ([item.value for item in side] for side in (a, b))
                gap = groups.difference(first, later, figure.scale, repeats=name in REPEATS)
                pairs.append(_Pair(name, figure, approaches[0], approaches[at], a, b, gap))
    judged = [pair for pair in pairs if pair.figure.tested and pair.gap.p is not None and not _unfit(pair)]
    # Figures that are proportional, such as a time and its price, are one and the same test.
    tests = {_test(pair): pair.gap.p or 0.0 for pair in judged}
    corrected = dict(zip(tests, groups.holm(list(tests.values())), strict=True))
    known = {(pair.later.name, pair.name): corrected[_test(pair)] for pair in judged}
    return [_judge(pair, mode, known.get((pair.later.name, pair.name))) for pair in pairs]


def _test(pair: _Pair) -> tuple[str, tuple[float, ...] | str]:
    return pair.later.name, pair.gap.same or pair.name


def _unfit(pair: _Pair) -> str:
    """Why a difference may not be judged, whatever its size; empty where it may."""
    if {_basis([item]) for item in pair.a} != {_basis([item]) for item in pair.b}:
        return "measured in one, estimated in the other"
    lone = [item.name for item, values in ((pair.first, pair.a), (pair.later, pair.b)) if len(values) < 2]
    if len(lone) == 2:
        return "one run each: no evidence of a difference"
    if lone:
        return f"one run of {lone[0]}: no evidence of a difference"
    if min(len(pair.a), len(pair.b)) < LEAST_RUNS:
        return f"fewer than {LEAST_RUNS} runs of an approach are too few to tell"
    if pair.figure.timed and not _elsewhere(pair):
        starts = [[line.started for line in item.runs] for item in (pair.first, pair.later)]
        if not groups.in_turn(*starts):
            return TAKE_TURNS
    return ""


def _elsewhere(pair: _Pair) -> bool:
    """Whether the two approaches ran on other machines altogether."""
    first, later = set(pair.first.machines), set(pair.later.machines)
    return bool(first and later and not first & later)


def _judge(pair: _Pair, mode: Mode, p: float | None) -> Difference:
    change, relative = _change(pair)
    answer: Answer = "not tested"
    reason = ""
    if not pair.a or not pair.b:
        answer, reason = "unknown", f"not known of {(pair.first if not pair.a else pair.later).name}"
    elif not pair.figure.tested:
        reason = "shown only"
    elif p is None:
        answer, reason = "not distinguishable", _unfit(pair)
    elif p >= ALPHA:
        answer, reason = "not distinguishable", _too_weak(pair)
    else:
        way = pair.figure.mode or mode
        up = _is_up(pair)
        answer = "better" if up == (way == "max") else "worse"
        reason = "on another machine, which is part of the difference" if _timed_elsewhere(pair) else ""
    return Difference(
        figure=pair.name, approach=pair.later.name, against=pair.first.name, change=change, relative=relative,
        answer=answer, reason=reason, p=p, method=pair.gap.method if pair.gap.p is not None else "",
    )  # fmt: skip


def _timed_elsewhere(pair: _Pair) -> bool:
    return pair.figure.timed and _elsewhere(pair)


def _is_up(pair: _Pair) -> bool:
    if pair.gap.value is not None:
        return pair.gap.value > 0
    doubled = groups.ranks([item.value for item in (*pair.a, *pair.b)])
    first, later = doubled[: len(pair.a)], doubled[len(pair.a) :]
    return sum(later) / len(later) > sum(first) / len(first)


def _too_weak(pair: _Pair) -> str:
    """Why a judged difference was not shown, in words."""
    gap = pair.gap
    if gap.low is None or gap.high is None:
        few = "" if min(len(pair.a), len(pair.b)) > 3 else f": {len(pair.a)} and {len(pair.b)} runs are few for ranks"
        return f"the ranks of the runs do not tell them apart{few}"
    if gap.low <= 0 <= gap.high:
        return "the interval of the difference holds zero"
    same = all(len({item.value for item in values}) == 1 for values in (pair.a, pair.b))
    if same:
        return "repeats that give one and the same value are no evidence"
    return "not after correction for the number of comparisons"


def _change(pair: _Pair) -> tuple[Quantity, bool]:
    """The change as a person reads it: a share of the first for what is compared by ratios, else a difference."""
    gap, figure = pair.gap, pair.figure
    values = [item.value for item in (*pair.a, *pair.b)]
    relative = figure.scale == "log" and groups.logs(values)
    unit = "fraction" if relative else figure.unit or next((item.entry.value.unit for item in pair.a or pair.b), "")
    if gap.value is None:
        return unknown(unit), relative
    basis = _basis([*pair.a, *pair.b])
    n = min(len(pair.a), len(pair.b))
    ends = (gap.value, gap.low, gap.high)
    shown = [None if end is None else _expm1(end) if relative else end for end in ends]
    return Quantity(shown[0], unit, shown[1], shown[2], n, basis), relative


def _expm1(value: float) -> float | None:
    try:
        return math.expm1(value)
    except OverflowError:
        return None


# ------------------------------------------------------------------------------------------------- remarks


def _remarks(
    given: Sequence[Group], found: Sequence[Sequence[Figures]], choice: Choice, until: Common
) -> list[str]:  # fmt: skip
    """What a reader must know to read the figures rightly."""
    told = []
    alone = [group.name for group in given if len(group.runs) == 1]
    if len(alone) == len(given):
        told.append("One run each: there is no evidence of any difference, whatever the figures are. "
                    "Repeat each with several seeds, in turn.")  # fmt: skip
    elif alone:
        told.append(f"One run of {', '.join(alone)}: nothing is known of its scatter.")
    if until.step is not None:
        steps = [perrun.last_step(item) or 0 for group in given for item in group.runs]
        told.append(f"The runs are of unlike length, {min(steps):,.0f} to {max(steps):,.0f} steps: their final values "
                    "are those of other trainings. What they had at the same step is compared, too.")  # fmt: skip
    machines = {name for group in given for item in group.runs if (name := machine(item.run))}
    if len(machines) > 1:
        told.append(f"Times are from different machines: {', '.join(sorted(machines))}.")
    for group, figures in zip(given, found, strict=True):
        told += _about(group, figures, choice)
    trainings = {repr((item.run.script, item.run.arguments, item.run.techniques))
                 for group in given for item in group.runs[:1]}  # fmt: skip
    if choice.name == series.LOSS and len(trainings) > 1:
        told.append("The approaches differ in script, arguments or techniques: their training losses need not mean "
                    "the same.")  # fmt: skip
    return told


def _about(group: Group, figures: Sequence[Figures], choice: Choice) -> list[str]:
    told = []
    statuses = [item.run.status for item in group.runs]
    open_ends = [status for status in ("running", "failed", "interrupted", "unknown") if status in statuses]
    if open_ends:
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in open_ends)
        told.append(f"{group.name}: of {len(statuses)} run{'s' * (len(statuses) > 1)} {counts}; "
                    "their last values are not the end of a training.")  # fmt: skip
    fired = sum(item.run.guard_fired for item in group.runs)
    if fired:
        told.append(f"{group.name}: the guard took techniques off in {fired} of {len(group.runs)} runs.")
    values = [item.values["metric"].value for item in figures if "metric" in item.values]
    if len(values) > 1 and len(set(values)) == 1:
        told.append(f"{group.name}: all runs have exactly the same {choice.name}. Were they made with different seeds?")
    return told
