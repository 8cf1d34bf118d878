"""Any record at all is drawn: huge, tiny, missing, not a number, contradictory."""

from __future__ import annotations

import io
import re
import types
import typing
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from sample_records import HOSTILE

from upshift.records import Finding, Measurement, Plan, Run, TuneReport
from upshift.records.plan import Pace
from upshift.records.quantity import Record
from upshift.records.trial import Band
from upshift.report import html, terminal

FLOATS = st.one_of(
    st.floats(),
    st.floats(0, 10),
    st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 1.0]),
)
INTS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 50))
TEXTS = st.one_of(st.text(alphabet=st.characters(), max_size=12), st.sampled_from(["", "s", "fraction", "x", *HOSTILE]))


@cache
def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a record's field type, by its annotation alone."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is float:
        return FLOATS
    if kind is bool:
        return st.booleans()
    if kind is int:
        return INTS
    if kind is str:
        return TEXTS
    if kind is type(None):
        return st.none()
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([any_of(item) for item in arguments])
    if origin is tuple and arguments[-1] is not ...:
        return st.tuples(*map(any_of, arguments))
    if origin is tuple:
        return st.lists(any_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(any_of(arguments[0]), any_of(arguments[1]), max_size=2)
    if kind is Band:
        return st.integers(1, 3).flatmap(a_band)
    if kind is Pace:
        # It checks itself, so only sound ones can lie in a plan.
        figures = st.lists(st.floats(1e-9, 1e9), min_size=3, max_size=3).map(sorted)
        return figures.map(lambda it: Pace(seconds=it[1], low=it[0], high=it[2], stretches=3))
    assert issubclass(kind, Record), kind
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: any_of(hints[name]) for name in kind.__struct_fields__})


def a_band(count: int) -> st.SearchStrategy[Band]:
    """A band checks itself, so only sound ones can lie in a record."""

    def columns(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
        return st.lists(values, min_size=count, max_size=count).map(tuple)

    return st.builds(
        Band,
        first=st.just(tuple(range(0, 10 * count, 10))),
        length=st.just((10,) * count),
        mean=columns(st.floats(allow_nan=False, allow_infinity=False)),
        spread=columns(st.floats(0, 1e300)),
        between=columns(st.floats(0, 1e300)),
    )


RELAXED = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def draws(renderable: Any, width: int) -> None:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(renderable)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue())
    file.getvalue().encode("utf-8")


def is_page(source: str) -> None:
    source.encode("utf-8")
    assert source.rstrip().endswith("</html>") and "<script" not in source
    for chart in re.findall(r"<svg.*?</svg>", source, re.S):
        assert not re.search(r'\b(x|y|x1|x2|y1|y2|cx|cy|r|width|height|d|points)="[^"]*(nan|inf)', chart)


WIDTHS = st.sampled_from([20, 60, 80, 120])


@RELAXED
@given(any_of(Measurement), st.lists(any_of(Finding), max_size=3), TEXTS, WIDTHS)
def test_any_diagnosis(measurement: Measurement, findings: list[Finding], verdict: str, width: int) -> None:
    draws(terminal.render_diagnosis(measurement, findings, verdict, width), width)
    is_page(html.render_diagnosis(measurement, findings, verdict))


@RELAXED
@given(any_of(TuneReport), st.lists(any_of(Run), max_size=1), WIDTHS)
def test_any_search(report: TuneReport, runs: list[Run], width: int) -> None:
    draws(terminal.render_tune(report), width)
    is_page(html.render_tune(report, runs))


@RELAXED
@given(any_of(Run), WIDTHS)
def test_any_run(run: Run, width: int) -> None:
    draws(terminal.render_run(run), width)
    is_page(html.render_run(run))


@RELAXED
@given(any_of(Plan), WIDTHS)
def test_any_plan(plan: Plan, width: int) -> None:
    draws(terminal.render_plan(plan), width)
