"""A comparison in words: its verdict, one screen of a terminal, and Markdown for a pull request."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from upshift.records.comparison import FIGURES, Approach, Comparison, Difference
from upshift.records.measurement import PHASE_TITLES, PHASES
from upshift.records.quantity import Quantity
from upshift.report import ledger_words, words
from upshift.report.blocks import facts, grid, head, indent, line

#: Approaches that fit beside each other in a table.
SIDE_BY_SIDE = 4
NOT_DISTINGUISHABLE = "not distinguishable"

_STYLES = {"better": "green", "worse": "yellow", NOT_DISTINGUISHABLE: "", "not tested": "dim", "unknown": "dim"}
_GATES = {"passed": "green", "warned": "bold yellow", "failed": "bold red", "unknown": "bold yellow"}
#: Told as everywhere else.
_LEDGER: dict[str, Callable[[float, str], str]] = {
    "cost": ledger_words.money_text,
    "cost_per_epoch": ledger_words.money_text,
    "energy": lambda value, _: ledger_words.energy_text(value),
    "carbon": lambda value, _: ledger_words.carbon_text(value),
}
#: The same thing in other words: what is said of the first is true of the second.
_FOLLOWS = {"hours", "carbon", "steps_to_target"}


def name_text(name: str) -> str:
    """The name of an approach, short enough for a table."""
    return words.clean(name, 40) or "(no name)"


def title(found: Comparison, figure: str) -> str:
    """What a figure is called here: `final performance (accuracy, higher is better)`."""
    told = FIGURES[figure].title
    metric = words.clean(found.metric, 40)
    if figure == "metric" and metric:
        return f"{told}: {metric}, {'higher' if found.mode == 'max' else 'lower'} is better"
    if figure == "at_step" and words.finite(found.common_step):
        return f"at step {found.common_step:,.0f}: {metric}"
    if figure == "at_time" and words.finite(found.common_time):
        return f"after {words.duration(found.common_time)}: {metric}"
    if figure in ("to_target", "steps_to_target") and found.target is not None:
        return f"{told} {number(found.target)}"
    if figure == "efficiency" and found.efficiency:
        return f"{told}: {words.clean(found.efficiency, 120)}"
    return told


def number(value: float | None) -> str:
    """A plain number with four significant digits, so that 0.9134 and 0.9128 are told apart."""
    if not words.finite(value):
        return words.UNKNOWN
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e12 else f"{value:.4g}"


def value_text(figure: str, value: float | None, currency: str) -> str:
    """A value of a figure with its unit."""
    unit = FIGURES[figure].unit
    if not words.finite(value):
        return words.UNKNOWN
    if unit in ("", "steps", "parameters") and figure not in _LEDGER:
        return number(value)
    if figure in _LEDGER:
        return _LEDGER[figure](value, currency)
    return words.value_text(value, unit)


def quantity_text(figure: str, quantity: Quantity | None, currency: str) -> str:
    """`0.9134 (0.9101 to 0.9167)`, `12.3 ms (estimated)`."""
    if quantity is None or not words.known(quantity):
        return words.UNKNOWN
    parts = [value_text(figure, quantity.value, currency)]
    if words.finite(quantity.low) and words.finite(quantity.high):
        bounds = [value_text(figure, end, currency) for end in (quantity.low, quantity.high)]
        parts.append(f"({bounds[0]} to {bounds[1]})")
    if quantity.basis == "estimated":
        parts.append("(estimated)")
    return " ".join(parts)


def cell(found: Comparison, approach: Approach, figure: str) -> str:
    """A figure of an approach; a target that most runs missed says so."""
    entry = approach.figures.get(figure)
    if entry is not None and not words.known(entry.value) and entry.how:
        return words.clean(entry.how, 80)
    text = quantity_text(figure, entry.value if entry is not None else None, found.currency)
    if figure == "to_target" and approach.reached is not None and approach.reached < len(approach.runs):
        text += f", reached by {approach.reached} of {len(approach.runs)}"
    return text


def change_text(difference: Difference, currency: str) -> str:
    """`-20.7 % (-22.9 % to -18.4 %)`; with its sign, later against first."""
    change = difference.change
    if not words.known(change):
        return words.UNKNOWN
    shown = [_signed(difference, value, currency) for value in (change.value, change.low, change.high)]
    known = words.finite(change.low) and words.finite(change.high)
    estimated = " (estimated)" if change.basis == "estimated" else ""
    return f"{shown[0]} ({shown[1]} to {shown[2]}){estimated}" if known else f"{shown[0]}{estimated}"


def _signed(difference: Difference, value: float | None, currency: str) -> str:
    if difference.relative:
        return words.percent(value, signed=True)
    text = value_text(difference.figure, value, currency)
    return f"+{text}" if words.finite(value) and value > 0 else text


def answer_text(difference: Difference) -> str:
    """`better (p 0.003)`, `not distinguishable: one run each: no evidence of a difference`."""
    if difference.answer in ("better", "worse"):
        # A metric of another name than "performance" is better or worse; an amount is more or less.
        told = f"{difference.answer}{p_text(difference.p)}"
        return f"{told}, {words.clean(difference.reason, 200)}" if difference.reason else told
    return f"{difference.answer}: {words.clean(difference.reason, 300)}" if difference.reason else difference.answer


def p_text(p: float | None) -> str:
    """` (p 0.003)`, corrected for the number of comparisons; empty where there is none."""
    if not words.finite(p):
        return ""
    return f" (p {p:.2g})" if p >= 1e-4 else " (p < 0.0001)"


def shown_figures(found: Comparison) -> list[str]:
    """Figures that at least one approach has, in order; a best value that is the final one is left out."""
    shown = [name for name in FIGURES if any(name in item.figures for item in found.approaches)]
    if "best" in shown and all(_same(item, "best", "metric") for item in found.approaches):
        shown.remove("best")
    if "loss" in shown and all(_same(item, "loss", "metric") for item in found.approaches):
        shown.remove("loss")
    return shown


def _same(approach: Approach, one: str, other: str) -> bool:
    a, b = approach.figures.get(one), approach.figures.get(other)
    return a is None or (b is not None and a.value == b.value)


def phase_names(found: Comparison) -> list[str]:
    """Phases of a step that some approach has spent time in, in the order of a step."""
    seen = {name for item in found.approaches for name, seconds in item.phases.items()
            if words.finite(seconds) and seconds > 0}  # fmt: skip
    return [*(name for name in PHASES if name in seen), *sorted(seen - set(PHASES))]


def phase_title(name: str) -> str:
    """`of a step: waiting for data`."""
    return f"of a step: {PHASE_TITLES.get(name, words.clean(name, 60))}"


def unknown_figures(found: Comparison) -> list[str]:
    """Titles of figures nothing is known of."""
    silent = {"best", "at_step", "at_time", "to_target", "steps_to_target", "loss"}
    return [figure.title for name, figure in FIGURES.items()
            if name not in silent and not any(name in item.figures for item in found.approaches)]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- verdict


def differences_of(found: Comparison, approach: str) -> dict[str, Difference]:
    """The differences of an approach against the first, by figure."""
    return {item.figure: item for item in found.differences if item.approach == approach}


def claim(found: Comparison) -> tuple[Literal["win", "baseline", "unproven"], str]:
    """What the figures allow to be said, in a few words; about performance, else about the time."""
    figure = "metric" if found.metric else "time"
    told = [item for item in found.differences if item.figure == figure]
    better = [item for item in told if item.answer == "better"]
    worse = [item for item in told if item.answer == "worse"]
    how = {"metric": "better", "time": "faster"}[figure]
    if better:
        names = " and ".join(name_text(item.approach) for item in better[:2])
        return "win", f"{names} {'is' if len(better) == 1 else 'are'} {how}"
    if worse and len(worse) == len(told):
        return "baseline", f"{name_text(found.approaches[0].name)} is {how}"
    return "unproven", "Not distinguishable" if told else "Not comparable"


def verdict(found: Comparison) -> list[str]:
    """The verdict in sentences: performance first, then what it took, the target, efficiency and the fronts."""
    told: list[str] = []
    first = found.approaches[0]
    for later in found.approaches[1:]:
        told += _against(found, first, later)
    if found.target is not None and all(item.reached is not None for item in found.approaches):
        counts = ", ".join(f"{item.reached} of {len(item.runs)} of {name_text(item.name)}" for item in found.approaches)
        told.append(f"The target {number(found.target)} was reached by {counts}.")
    for name, what in (("cost", "cost"), ("time", "duration")):
        front = [name_text(item.name) for item in found.approaches if name in item.front]
        if front:
            told.append(f"On the Pareto front of performance and {what}, by the middle figures: {', '.join(front)}.")
    return told


def _against(found: Comparison, first: Approach, later: Approach) -> list[str]:
    names = name_text(later.name), name_text(first.name)
    known = differences_of(found, later.name)
    told = []
    result = known.get("metric")
    if result is not None:
        told.append(_about(found, result, names))
    else:
        told.append(f"Whether {names[0]} performs better than {names[1]} is unknown: {found.metric_note}.")
    if (same := known.get("at_step")) is not None and words.finite(found.common_step):
        told.append(f"At step {found.common_step:,.0f}, which all runs made: {change_text(same, found.currency)}, "
                    f"{answer_text(same)}.")  # fmt: skip
    others = [item for figure, item in known.items()
              if figure not in ("metric", "at_step") and FIGURES[figure].tested and figure not in _FOLLOWS]  # fmt: skip
    for way in ("better", "worse"):
        of_it = [f"{FIGURES[item.figure].title} {change_text(item, found.currency)}" for item in others
                 if item.answer == way]  # fmt: skip
        if of_it:
            told.append(f"{names[0]} is {way} than {names[1]} in: {'; '.join(of_it)}.")
    told += _undecided(others)
    return told


def _undecided(others: Sequence[Difference]) -> list[str]:
    """What cannot be told apart, those with one reason together."""
    reasons: dict[str, list[str]] = {}
    for item in others:
        if item.answer == NOT_DISTINGUISHABLE:
            reasons.setdefault(item.reason, []).append(FIGURES[item.figure].title)
    return [f"Not distinguishable in {', '.join(titles)}: {words.clean(reason, 300)}."
            for reason, titles in reasons.items()]  # fmt: skip


def _about(found: Comparison, result: Difference, names: tuple[str, str]) -> str:
    metric = words.clean(found.metric, 60)
    shown = f"the difference is {change_text(result, found.currency)}"
    if result.answer in ("better", "worse"):
        return f"{names[0]} is {result.answer} than {names[1]} in {metric}: {shown}{p_text(result.p)}."
    if result.answer == NOT_DISTINGUISHABLE:
        why = words.clean(result.reason, 300)
        return f"{names[0]} and {names[1]} are not distinguishable in {metric}: {why}; {shown}."
    return f"Whether {names[0]} performs better than {names[1]} is unknown: {words.clean(result.reason, 300)}."


# ---------------------------------------------------------------------------------------------------- terminal


def render_compare(found: Comparison) -> RenderableType:
    """Approaches side by side on a terminal: verdict, figures, differences, limits and notes."""
    top = Text("upshift compare  ", style="bold", overflow="fold")
    top.append(" · ".join(name_text(item.name) for item in found.approaches), style="cyan")
    parts: list[RenderableType] = [top, Text(), _text_of(claim(found)[1] + ".", "bold")]
    parts += [_text_of(sentence) for sentence in verdict(found)]
    parts.append(Text())
    parts.append(_table(found) if len(found.approaches) <= SIDE_BY_SIDE else _blocks(found))
    parts += [Text(), head("Differences"), indent(_differences(found))]
    if found.gates:
        parts += [Text(), head("Limits")]
        for gate in found.gates:
            told = f"{gate.outcome}: {words.clean(gate.text, 60)}  {name_text(gate.approach)}: "
            parts.append(indent(_text_of(told + words.clean(gate.reason, 200), _GATES[gate.outcome])))
    parts.append(Text())
    parts += [_text_of(f"- {note}", "dim") for note in all_notes(found)]
    return Group(*parts)


def _text_of(text: str, style: str = "") -> Text:
    return line(text, style)


def _runs(approach: Approach) -> str:
    return f"{len(approach.runs)} run{'' if len(approach.runs) == 1 else 's'}"


def _table(found: Comparison) -> RenderableType:
    table = grid(("", ""), *((name_text(item.name), "right") for item in found.approaches))
    table.add_row(line("runs", "dim"), *(line(_runs(item)) for item in found.approaches))
    if any(item.techniques for item in found.approaches):
        row = [line(words.names_text(item.techniques)) for item in found.approaches]
        table.add_row(line("techniques", "dim"), *row)
    for figure in shown_figures(found):
        row = [line(cell(found, item, figure)) for item in found.approaches]
        table.add_row(line(title(found, figure), "dim"), *row)
        for name in phase_names(found) if figure == "step" else ():
            times = [line(words.duration(item.phases.get(name)), "dim") for item in found.approaches]
            table.add_row(line(phase_title(name), "dim"), *times)
    return table


def _blocks(found: Comparison) -> RenderableType:
    parts: list[RenderableType] = []
    for approach in found.approaches:
        rows = [("runs", _runs(approach))]
        rows += [(FIGURES[figure].title, cell(found, approach, figure)) for figure in shown_figures(found)]
        parts += [line(name_text(approach.name), "bold"), indent(facts(rows)), Text()]
    return Group(*parts[:-1])


def _differences(found: Comparison) -> RenderableType:
    table = grid(("figure", ""), ("change", "right"), ("", ""))
    for later in found.approaches[1:]:
        told = f"{name_text(later.name)} against {name_text(found.approaches[0].name)}"
        table.add_row(line(told, "bold"), line(""), line(""))
        for figure, item in differences_of(found, later.name).items():
            if figure in shown_figures(found):
                row = (line(FIGURES[figure].title, "dim"), line(change_text(item, found.currency)))
                table.add_row(*row, line(answer_text(item), _STYLES[item.answer]))
    return table


def all_notes(found: Comparison) -> list[str]:
    """What a reader must know, shared by all forms."""
    notes = [f"Metric: {found.metric_note}."] if found.metric_note else []
    notes += found.notes
    for approach in found.approaches:
        for run in approach.runs:
            notes += [f"{name_text(approach.name)}, {words.clean(run.run, 200)}: {note}." for note in run.notes]
    if any(len(approach.runs) > 1 for approach in found.approaches):
        notes.append(f"Intervals hold the mean over runs at {words.percent(found.level)}; amounts are geometric means. "
                     "p is corrected for the number of comparisons (Holm).")  # fmt: skip
    unknown = unknown_figures(found)
    if unknown:
        notes.append(f"Unknown, and never counted as zero: {', '.join(unknown)}.")
    return [words.clean(note, 600) for note in notes]


# ---------------------------------------------------------------------------------------------------- Markdown

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$])")


def escaped(text: object, limit: int = 600) -> str:
    """Text that means itself in Markdown, in a table too; no tag, link, picture or mention comes of it."""
    plain = words.clean(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = _SPECIAL.sub(r"\\\1", plain).replace("@", "&#64;")
    return plain.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def markdown(found: Comparison) -> str:
    """The comparison as Markdown: verdict, figures, differences, limits, notes."""
    lines = [f"### upshift compare: {escaped(claim(found)[1], 120)}", ""]
    lines += [f"- {escaped(sentence)}" for sentence in verdict(found)]
    names = [escaped(name_text(item.name)) for item in found.approaches]
    lines += ["", _row(["", *names]), _row(["---", *["---:"] * len(names)])]
    lines.append(_row(["runs", *(str(len(item.runs)) for item in found.approaches)]))
    for figure in shown_figures(found):
        lines.append(_row([escaped(title(found, figure)),
                           *(escaped(cell(found, item, figure)) for item in found.approaches)]))  # fmt: skip
    lines += ["", _row([f"against {names[0]}", "figure", "change", "answer"]), _row(["---", "---", "---:", "---"])]
    for item in found.differences:
        if item.figure in shown_figures(found):
            lines.append(_row([escaped(name_text(item.approach)), FIGURES[item.figure].title,
                               escaped(change_text(item, found.currency)), escaped(answer_text(item))]))  # fmt: skip
    if found.gates:
        lines += ["", _row(["limit", "approach", "outcome", ""]), _row(["---"] * 4)]
        lines += [_row([escaped(gate.text), escaped(name_text(gate.approach)), gate.outcome, escaped(gate.reason)])
                  for gate in found.gates]  # fmt: skip
    lines += ["", *(f"- {escaped(note)}" for note in all_notes(found)), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
