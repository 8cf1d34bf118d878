"""Charts: what is drawn stands where the figures say, and what cannot be drawn is left out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import HOSTILE, curves, floor, pairing

from upshift.records import Pairing, unknown
from upshift.report import curves as charts
from upshift.report import svg
from upshift.report.drawing import ratio_ticks

WIDTHS = (350.0, 910.0)


def parse(markup: object) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def classed(root: ElementTree.Element, tag: str, cls: str) -> list[ElementTree.Element]:
    return [item for item in root.iter(tag) if cls in (item.get("class") or "").split()]


@pytest.mark.parametrize("width", WIDTHS)
def test_anatomy_widths_are_the_shares(width: float) -> None:
    parts = (svg.Part("data", 0.03, "30 %"), svg.Part("forward", 0.05, "50 %"))
    root = parse(svg.anatomy([svg.Bar("a", 0.1, "100 ms", parts), svg.Bar("b", 0.05, "50 ms")], width, "x"))
    data, forward = classed(root, "rect", "p-data")[0], classed(root, "rect", "p-forward")[0]
    whole, half = classed(root, "rect", "bar-rest")[0], classed(root, "rect", "bar-plain")[0]
    assert float(data.get("width", 0)) + 1.5 == pytest.approx(0.3 * width, abs=0.1)
    assert float(forward.get("x", 0)) == pytest.approx(0.3 * width, abs=0.1)
    assert float(whole.get("width", 0)) == pytest.approx(width)
    assert float(half.get("width", 0)) == pytest.approx(width / 2)


@pytest.mark.parametrize("width", WIDTHS)
def test_forest_is_ordered_on_a_log_axis(width: float) -> None:
    ratios = (0.5, 1.0, 2.0)
    rows = [svg.Row(f"t{r}", "", pairing(r, 0.02), "same", True) for r in ratios]
    root = parse(svg.forest(rows, width, "x"))
    dots = [float(dot.get("cx", 0)) for dot in classed(root, "circle", "dot")]
    one = float(classed(root, "line", "one")[0].get("x1", 0))
    assert dots[1] == pytest.approx(one, abs=0.1)
    assert one - dots[0] == pytest.approx(dots[2] - one, abs=0.1)
    assert len(classed(root, "line", "ci")) == 9


def test_forest_marks_kept_and_unconfirmed() -> None:
    rows = [
        svg.Row("a", "", pairing(1.5, 0.02), "kept", True, "Confirmed"),
        svg.Row("b", "", pairing(1.5, 0.02), "faster", False, "Screened"),
    ]
    root = parse(svg.forest(rows, 910, "x"))
    assert len(classed(root, "circle", "k-kept")) == 1
    assert len(classed(root, "circle", "hollow")) == 1
    assert [item.text for item in classed(root, "text", "group")] == ["Confirmed", "Screened"]


def test_roofline_only_where_the_floor_is_known() -> None:
    import msgspec

    assert svg.roofline(floor(), 0.06, 910, "x") is not None
    assert svg.roofline(floor(), None, 910, "x") is None
    for field in ("flops", "bytes_moved", "bandwidth", "peak_flops"):
        missing = msgspec.structs.replace(floor(), **{field: unknown("")})
        assert svg.roofline(missing, 0.06, 910, "x") is None
    without_best = msgspec.structs.replace(floor(), best_peak_flops=unknown("FLOP/s"))
    assert str(svg.roofline(without_best, 0.06, 910, "x")).count('class="roof') == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_the_step_lies_below_the_roof(width: float) -> None:
    root = parse(svg.roofline(floor(), 0.0614, width, "x"))
    dot = classed(root, "circle", "dot")[0]
    drop = classed(root, "line", "drop")[0]
    assert float(dot.get("cy", 0)) > float(drop.get("y2", 0))


def test_losses_break_where_they_are_not_finite() -> None:
    stock, planned = (list(curve[:60]) for curve in curves())
    planned[30] = math.nan
    planned[31] = math.inf
    root = parse(charts.losses(stock, planned, 910, "x"))
    raw = classed(root, "path", "raw")
    assert raw[0].get("d", "").count("M") == 1 and raw[1].get("d", "").count("M") == 2
    assert len(classed(root, "line", "bad")) == 2
    desc = root.find("desc")
    assert desc is not None and "2 values were not finite" in (desc.text or "")
    assert charts.losses([1.0], [1.0], 910, "x") is None
    assert charts.losses([math.nan] * 5, [math.nan] * 5, 910, "x") is None


def test_many_points_are_thinned_but_spikes_stay() -> None:
    values = [1.0] * 50_000
    values[31_234] = 9.0
    kept = charts.thin(values, 500)
    assert len(kept) <= 520 and 31_234 in kept
    assert len(str(charts.losses(values, values, 910, "x"))) < 60_000


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_names_stay_text(name: str, width: float) -> None:
    drawings = [
        svg.forest([svg.Row(name, name, pairing(1.2, 0.02), "kept", True, name)], width, "x"),
        svg.anatomy([svg.Bar(name, 0.1, name, (svg.Part(name, 0.1, name),))], width, "x"),
    ]
    for drawing in drawings:
        root = parse(drawing)
        assert {item.tag for item in root.iter()} <= {"svg", "title", "desc", "rect", "line", "circle", "text", "path"}
        assert not any(key.startswith("on") or key == "style" for item in root.iter() for key in item.attrib)


@given(
    st.lists(st.tuples(*[st.floats() | st.sampled_from([1e308, 5e-324, 0.0, -1.0])] * 3), max_size=4),
    st.sampled_from(WIDTHS),
)
def test_forest_survives_any_figures(figures: list[tuple[float, float, float]], width: float) -> None:
    rows = [svg.Row("t", "", Pairing(a, b, c, 1), "same", True) for a, b, c in figures]
    drawing = svg.forest(rows, width, "x")
    if drawing is not None:
        parse(drawing)
        assert not re.search(r'="[^"]*(nan|inf)', str(drawing))


@given(st.lists(st.floats(), max_size=30), st.lists(st.floats(), max_size=30), st.sampled_from(WIDTHS))
def test_losses_survive_any_figures(stock: list[float], planned: list[float], width: float) -> None:
    for drawing in (
        charts.losses(stock, planned, width, "x"),
        charts.series(list(enumerate(stock)), width, "x", title="t", from_zero=True),
    ):
        if drawing is not None:
            parse(drawing)
            assert not re.search(r'(d|x|y|x1|x2|y1|y2|points)="[^"]*(nan|inf)', str(drawing))


@given(st.floats(1e-3, 1e3), st.floats(1.02, 500))
def test_ratio_ticks_lie_inside_and_are_few(low: float, factor: float) -> None:
    ticks = ratio_ticks(low, low * factor, 400)
    assert len(ticks) <= 10
    assert all(low * 0.98 <= tick <= low * factor * 1.02 for tick in ticks)
