"""A comparison as one offline HTML file, in the manner of `html.py`: no script, nothing loaded, a strict policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from upshift.records.comparison import FIGURES, Approach, Comparison, Point
from upshift.report import compare_charts as charts
from upshift.report import compared, html, words
from upshift.report.views import NARROW, WIDE, Cell, Claim, Column, Fact, Figure

#: Figures that are drawn as bars, where they are known.
BARS = ("metric", "to_target", "step", "time", "cost", "energy", "carbon", "memory", "gpu_memory", "efficiency")
_PILLS = {"better": "good", "worse": "warn", "passed": "good", "warned": "warn", "failed": "bad", "unknown": "warn"}


@cache
def _style() -> tuple[Markup, str]:
    """The style sheet of all pages with what comparisons add, and the policy that allows exactly it."""
    folder = files("upshift.report").joinpath("templates")
    css = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "compare.css"))
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return Markup(css), policy


def render_compare(found: Comparison, *, label: str = "") -> str:
    """A comparison as one page: verdict, limits, curves, bars, fronts, differences, runs and notes.

    Args:
        label: a remark under the title, such as that the figures are an example.
    """
    css, csp = _style()
    names = " · ".join(compared.name_text(item.name) for item in found.approaches)
    page = {
        "title": f"upshift compare: {names}", "kind": "compare", "when": words.when_text(found.created),
        "command": words.clean(names, 400), "label": label,
    }  # fmt: skip
    kind, big = compared.claim(found)
    template = html.environment().get_template("compare.html.j2")
    return template.render(
        page=page, css=css, csp=Markup(csp),
        claim=Claim(kind, big, "", (f"{len(found.approaches)} approaches, {_runs(found)} runs",),
                    compared.verdict(found)),
        strip=_strip(found),
        gate_columns=(Column("limit"), Column("approach"), Column("outcome"), Column("why")),
        gates=[(Cell(gate.text), Cell(compared.name_text(gate.approach)),
                Cell(gate.outcome, pill=_PILLS[gate.outcome]), Cell(gate.reason)) for gate in found.gates],
        curves_lead=_curves_lead(found), curves=_curves(found),
        bars=_bars(found), columns=_columns(found), rows=_rows(found), fronts=_fronts(found),
        difference_columns=(Column("figure"), Column("change", True), Column("answer"), Column("how")),
        differences=_differences(found),
        run_columns=(Column("run"), Column("status"), Column("steps", True), Column("metric", True), Column("machine")),
        runs=_run_rows(found), notes=compared.all_notes(found),
    )  # fmt: skip


def _runs(found: Comparison) -> int:
    return sum(len(item.runs) for item in found.approaches)


def _figure(draw: Callable[[float, str], Markup | None], ident: str, caption: str = "") -> Figure | None:
    """A chart in both widths; None where there is nothing to draw."""
    drawn = [{"cls": cls, "svg": drawing} for cls, width in (("wide", WIDE), ("narrow", NARROW))
             if (drawing := draw(width, f"{ident}-{cls[0]}")) is not None]  # fmt: skip
    return Figure(tuple(drawn), caption) if drawn else None


def _strip(found: Comparison) -> list[Fact]:
    """The first figures of the table, all approaches in one cell each."""
    facts: list[Fact] = []
    for figure in ("metric", "step", "time", "cost", "energy", "efficiency"):
        known = [item.figures[figure].value for item in found.approaches if figure in item.figures]
        if len(known) == len(found.approaches) and len(facts) < 4:
            texts = [compared.value_text(figure, item.value, found.currency) for item in known]
            estimated = "estimated, " if any(item.basis == "estimated" for item in known) else ""
            facts.append(Fact(FIGURES[figure].title, " · ".join(texts[:4]), f"{estimated}in the order above"))
    return facts


def _label(at: int, approach: Approach) -> str:
    return f"{charts.letter(at)} {compared.name_text(approach.name)}"


def _curves_lead(found: Comparison) -> str:
    runs = "One line per run; the runs of an approach share colour and dash."
    return f"{found.metric_note[:1].upper()}{found.metric_note[1:]}. {runs}" if found.metric_note else runs


def _curves(found: Comparison) -> list[Figure]:
    """The metric, then the training loss, over steps and over time."""
    drawn = []
    metric = words.clean(found.metric, 60)
    lossy = all(run.metric == run.loss for item in found.approaches for run in item.runs)
    kinds = [("metric", metric, found.target)] if found.metric else []
    kinds += [] if lossy and kinds else [("loss", "training loss", None)]
    for field, title, target in kinds:
        for axis, x_title, form in (("step", "step", lambda v: f"{v:,.0f}"), ("at", "time", words.duration)):
            runs = [charts.Curve(_label(at, item), at, _points(getattr(run, field), axis))
                    for at, item in enumerate(found.approaches) for run in item.runs]  # fmt: skip

            def draw(width: float, ident: str, runs: Sequence[charts.Curve] = runs, title: str = title,
                     x_title: str = x_title, form: Callable[[float], str] = form,
                     target: float | None = target) -> Markup | None:  # fmt: skip
                return charts.curves(runs, width, ident, title=f"{title} over {x_title}", x_title=x_title,
                                     x_form=form, target=target)  # fmt: skip

            figure = _figure(draw, f"{field}-{axis}", f"{title.capitalize()} over {x_title}.")
            if figure is not None:
                drawn.append(figure)
    return drawn


def _points(points: Sequence[Point], axis: str) -> tuple[tuple[float, float | None], ...]:
    placed = [(getattr(point, axis), point.value) for point in points]
    return tuple((x, y) for x, y in placed if x is not None)


def _bars(found: Comparison) -> Figure | None:
    panels = []
    for figure in BARS:
        drawn = []
        for at, item in enumerate(found.approaches):
            entry = item.figures.get(figure)
            if entry is not None and words.known(entry.value) and words.finite(entry.value.value):
                value = entry.value
                text = compared.quantity_text(figure, value, found.currency)
                drawn.append(charts.Bar(_label(at, item), at, entry.value.value, value.low, value.high, text))
        if drawn:
            panels.append(charts.Panel(compared.title(found, figure), tuple(drawn)))
    return _figure(lambda width, ident: charts.bars(panels, width, ident), "bars")


def _columns(found: Comparison) -> tuple[Column, ...]:
    return (Column("figure"), *(Column(_label(at, item)) for at, item in enumerate(found.approaches)))


def _rows(found: Comparison) -> list[tuple[Cell, ...]]:
    rows = [(Cell("runs"), *(Cell(str(len(item.runs))) for item in found.approaches))]
    if any(item.techniques for item in found.approaches):
        arms = (Cell(words.names_text(item.techniques), words.arm_text(item.techniques)) for item in found.approaches)
        rows.append((Cell("techniques"), *arms))
    for figure in compared.shown_figures(found):
        cells = [Cell(compared.cell(found, item, figure), _how(item, figure)) for item in found.approaches]
        rows.append((Cell(compared.title(found, figure)), *cells))
        for name in compared.phase_names(found) if figure == "step" else ():
            times = (Cell(words.duration(item.phases.get(name))) for item in found.approaches)
            rows.append((Cell(compared.phase_title(name)), *times))
    return rows


def _how(approach: Approach, figure: str) -> str:
    entry = approach.figures.get(figure)
    return words.clean(entry.how, 300) if entry is not None and words.known(entry.value) else ""


def _fronts(found: Comparison) -> list[Figure]:
    drawn = []
    for name, title, form in (("cost", "cost", charts.money(found.currency)), ("time", "duration", words.duration)):
        spots = []
        for at, item in enumerate(found.approaches):
            y, x = (item.figures[key].value.value if key in item.figures else None for key in ("metric", name))
            if x is not None and y is not None:
                tip = (f"{compared.name_text(item.name)}: {compared.number(y)} for "
                       f"{compared.value_text(name, x, found.currency)}")  # fmt: skip
                spots.append(charts.Spot(_label(at, item), at, x, y, name in item.front, tip))

        def draw(width: float, ident: str, spots: Sequence[charts.Spot] = spots, title: str = title,
                 form: Callable[[float], str] = form) -> Markup | None:  # fmt: skip
            return charts.scatter(spots, width, ident, x_title=title, y_title=words.clean(found.metric, 60),
                                  higher=found.mode == "max", x_form=form)  # fmt: skip

        figure = _figure(draw, f"front-{name}")
        if figure is not None:
            drawn.append(figure)
    return drawn


def _differences(found: Comparison) -> list[tuple[Cell, ...]]:
    shown = compared.shown_figures(found)
    first = compared.name_text(found.approaches[0].name)
    return [
        (
            Cell(FIGURES[item.figure].title, f"{compared.name_text(item.approach)} against {first}"),
            Cell(compared.change_text(item, found.currency)),
            Cell(item.answer, words.clean(item.reason, 300), pill=_PILLS.get(item.answer, "plain")),
            Cell(compared.p_text(item.p).strip(" ()"), item.method if item.p is not None else ""),
        )
        for item in found.differences
        if item.figure in shown
    ]


def _run_rows(found: Comparison) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for at, approach in enumerate(found.approaches):
        for run in approach.runs:
            metric = compared.number(run.figures.get("metric"))
            rows.append((Cell(run.run, _label(at, approach)), Cell(run.status, words.clean(run.started, 40)),
                         Cell(f"{run.steps:,}"), Cell(metric), Cell(run.machine or words.UNKNOWN)))  # fmt: skip
    return rows
