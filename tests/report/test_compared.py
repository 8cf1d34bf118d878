"""A comparison drawn: the terminal, the page and Markdown claim what the record holds, whatever it holds."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len
from rich.console import Console
from sample_records import HOSTILE

from upshift.records.comparison import FIGURES, Approach, Comparison, Difference, Gate, Line, Point
from upshift.records.ledger import Entry
from upshift.records.quantity import Quantity, estimated, unknown
from upshift.report import compare_charts as charts
from upshift.report import compare_page, compared


def line(name: str, at: int, value: float | None = 0.9) -> Line:
    points = tuple(Point(100.0 * k, 10.0 * k, None if value is None else value * k / 5) for k in range(6))
    return Line(run=f"{name}/{at}", status="finished", started="2026-01-01 00:00:00", machine="cpu X", steps=500,
                figures={"metric": value}, metric=points, loss=points)  # fmt: skip


def approach(name: str, value: float, cost: float, runs: int = 3, **more: object) -> Approach:
    near = (value * 0.99, value * 1.01)
    figures = {
        "metric": Entry(Quantity(value, "", *near, runs), "last value of the run"),
        "step": Entry(Quantity(0.01, "s", 0.0098, 0.0102, runs)),
        "cost": Entry(Quantity(cost, "USD", cost * 0.9, cost * 1.1, runs)),
        "energy": Entry(estimated(7.2e6, "J", 3.6e6, 9e6)),
    }
    more = {"phases": {"data": 0.004, "forward": 0.003, name: 0.001}, "techniques": {"cache": {}}, **more}
    return Approach(name=name, runs=tuple(line(name, at, value) for at in range(runs)), script="train.py",
                    machines=("cpu X",), figures=figures, **more)  # type: ignore[arg-type]  # fmt: skip


def comparison(first: str = "stock", later: str = "planned") -> Comparison:
    a, b = approach(first, 0.90, 2.0, reached=2), approach(later, 0.92, 1.0, reached=3, front=("cost", "time"))
    change = Quantity(0.02, "", 0.01, 0.03, 3)
    cheaper = Quantity(-0.5, "fraction", -0.6, -0.4, 3)
    return Comparison(
        created="2026-01-01T12:00:00Z", metric="accuracy", mode="max", metric_note="all runs have it",
        approaches=(a, b), target=0.8, efficiency="accuracy / cost",
        differences=(
            Difference("metric", later, first, change, False, "better", "", 0.003, "Welch's t"),
            Difference("step", later, first, replace(cheaper, value=0.0, low=-0.01, high=0.01), True,
                       "not distinguishable", "the interval of the difference holds zero", 0.9, "Welch's t"),
            Difference("cost", later, first, cheaper, True, "better", "", 0.01, "Welch's t"),
            Difference("energy", later, first, unknown("fraction"), True, "unknown", f"not known of {first}"),
        ),
        notes=("Times are from different machines: cpu X, cuda H200.",),
        gates=(Gate("step>+2%", later, "step", "passed", "0.00% (-1.00% to 1.00%)"),
               Gate("cost<0.1", later, "cost", "unknown", "the cost is not known")),
    )  # fmt: skip


def undecided() -> Comparison:
    found = comparison()
    return replace(found, differences=tuple(
        replace(item, answer="not distinguishable", reason="one run each: no evidence of a difference", p=None)
        for item in found.differences))  # fmt: skip


def show(found: Comparison, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(compared.render_compare(found))
    return file.getvalue()


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


class Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.balanced = True
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.balanced &= bool(self.stack) and self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def test_the_verdict_claims_what_was_shown() -> None:
    told = " ".join(compared.verdict(comparison()))
    assert compared.claim(comparison()) == ("win", "planned is better")
    for wanted in (
        "planned is better than stock in accuracy: the difference is +0.02 (+0.01 to +0.03) (p 0.003)",
        "planned is better than stock in: cost -50 % (-60 % to -40 %)",
        "Not distinguishable in time per step: the interval of the difference holds zero",
        "The target 0.8 was reached by 2 of 3 of stock, 3 of 3 of planned",
        "On the Pareto front of performance and cost, by the middle figures: planned",
    ):
        assert wanted in told
    assert "is better" not in " ".join(compared.verdict(undecided()))
    assert compared.claim(undecided())[1] == "Not distinguishable"


def test_a_worse_later_approach_leaves_the_first() -> None:
    found = comparison()
    worse = tuple(replace(item, answer="worse") for item in found.differences if item.figure == "metric")
    assert compared.claim(replace(found, differences=worse)) == ("baseline", "stock is better")
    without = replace(found, metric="", differences=())
    assert compared.claim(without)[0] == "unproven" and "unknown" in " ".join(compared.verdict(without))


def test_the_terminal_shows_figures_differences_limits_and_notes() -> None:
    text = one_line(show(comparison()))
    for wanted in (
        "stock · planned", "0.9 (0.891 to 0.909)", "$1.00", "2 kWh", "(estimated)", "better (p 0.003)",
        "unknown: not known of stock", "of a step: waiting for data 4 ms 4 ms", "techniques cache cache",
        "passed: step>+2%", "unknown: cost<0.1", "different machines",
        "Unknown, and never counted as zero: duration", "Holm",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_many_approaches_stand_below_each_other() -> None:
    found = comparison()
    many = tuple(approach(f"try{at}", 0.9, 1.0) for at in range(9))
    text = show(replace(found, approaches=many, differences=()), 80)
    assert all(f"try{at}" in text for at in range(9)) and max(map(cell_len, text.splitlines())) <= 80


def hostile(name: str) -> Comparison:
    found = comparison(name, f"{name}2")
    return replace(found, metric=name, metric_note=name, notes=(name,), efficiency=name, currency=name,
                   gates=(Gate(name, name, "step", "failed", name),))  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("width", [60, 100])
def test_hostile_names_act_nowhere(name: str, width: int) -> None:
    text = show(hostile(name), width)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert max(map(cell_len, text.splitlines())) <= width
    page = Page(compare_page.render_compare(hostile(name)))
    assert page.balanced and not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") or key == "style" for _, attributes in page.tags for key in attributes)


def test_the_page_loads_nothing_and_its_policy_fits() -> None:
    source = compare_page.render_compare(comparison(), label="an example")
    page = Page(source)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")) or ""
    style = re.findall(r"<style>(.*?)</style>", source, re.S)
    expected = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert len(style) == 1 and f"style-src 'sha256-{expected}'" in policy and "default-src 'none'" in policy
    assert "http:" not in source and "https:" not in source and "url(" not in source
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for wanted in ("planned is better", "accuracy over step", "an example", "Pareto", "stock/0", "performs as well"):
        assert wanted in page.text, wanted
    # The metric (the loss is the same here) over step and time, bars, one front: each for a desk and for a phone.
    assert source.count("<svg") == 2 * (2 + 1 + 1)


def test_the_page_without_any_figure() -> None:
    bare = Approach(name="a", runs=(Line("r", "unknown", "", "", 0),))
    found = Comparison("", "", "min", "", (bare, replace(bare, name="b")))
    page = Page(compare_page.render_compare(found))
    assert page.balanced and "No curve" in page.text and "<svg" not in compare_page.render_compare(found)
    assert "unknown" in one_line(show(found)) and "Not comparable" in compared.markdown(found)


def cells(row: str) -> list[str]:
    return re.split(r"(?<!\\)\|", row.strip().strip("|"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.sampled_from([*HOSTILE, "a|b", "[x](http://e.com)", "@you", "`c`", "a\nb", "\\|"]), st.text(max_size=30)
    )
)
def test_markdown_tables_keep_their_columns_and_hold_no_markup(name: str) -> None:
    text = compared.markdown(hostile(name))
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        rows = table.strip().split("\n")
        assert len({len(cells(row)) for row in rows}) == 1
    assert "<" not in text and "@" not in text and "://" not in text
    assert not re.search(r"(?<!\\)`|(?<!\\)\[", text)


def test_markdown_says_what_the_terminal_says() -> None:
    text = compared.markdown(comparison())
    assert text.startswith("### upshift compare: planned is better\n")
    assert "| final performance: accuracy, higher is better | 0.9 (0.891 to 0.909) |" in text
    assert "| planned | cost | -50 % (-60 % to -40 %) | better (p 0.01) |" in text


ANY = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1e308, -1e308, 5e-324]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(FIGURES)), st.tuples(ANY, ANY, ANY), max_size=8), st.lists(ANY, max_size=4))
def test_any_figures_are_drawn(figures: dict[str, tuple[float | None, ...]], values: list[float | None]) -> None:
    entries = {name: Entry(Quantity(v[0], FIGURES[name].unit, v[1], v[2], 2), "how") for name, v in figures.items()}
    points = tuple(Point(float(at), None if v is None else v, v) for at, v in enumerate(values))
    odd = tuple(Approach(name=name, figures=entries, runs=(Line("r", "failed", "", "", 0, {}, points, points),))
                for name in ("a", "b"))  # fmt: skip
    differences = tuple(
        Difference(name, "b", "a", Quantity(v[0], "", v[1], v[2], 2), False, "not tested", "")
        for name, v in figures.items()
    )
    found = Comparison("x", "m", "min", "", odd, differences, target=values[0] if values else None)
    show(found, 60)
    compared.markdown(found)
    source = compare_page.render_compare(found)
    assert Page(source).balanced and not re.search(
        r'"[^"<>]*\b(nan|inf)\b[^"<>]*"', re.sub(r"<t.*?</t\w+>", "", source)
    )


def test_curves_keep_to_their_area_and_need_two_points() -> None:
    def draw(points: tuple[tuple[float, float | None], ...]) -> object:
        return charts.curves([charts.Curve("a", 0, points)], 600, "i", title="t", x_title="step", x_form=str)

    assert draw(((0.0, 1.0),)) is None and draw(()) is None and draw(((0.0, None), (1.0, None))) is None
    source = str(draw(((0.0, 1.0), (1.0, float("nan")), (2.0, 3.0))))
    numbers = [float(v) for v in re.findall(r"[ML]([\d.]+)", source)]
    assert numbers and all(0 <= value <= 600 for value in numbers)
    assert len(re.findall("M", re.search(r' d="([^"]+)"', source)[1])) == 2  # type: ignore[index]


def test_bars_are_as_long_as_their_values() -> None:
    panel = charts.Panel("p", (charts.Bar("a", 0, 1.0, None, None, "1"), charts.Bar("b", 1, 2.0, 1.5, 2.5, "2")))
    source = str(charts.bars([panel], 900, "i"))
    widths = [float(w) for w in re.findall(r'cmp-bar[^>]*? width="([\d.]+)"', source)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert source.count("cmp-ci") == 3
    assert charts.bars([], 900, "i") is None


@pytest.mark.parametrize("higher", [True, False])
def test_better_is_up(higher: bool) -> None:
    spots = [charts.Spot("a", 0, 1.0, 0.5, True, "a"), charts.Spot("b", 1, 2.0, 0.9, True, "b")]
    source = str(charts.scatter(spots, 600, "i", x_title="x", y_title="y", higher=higher, x_form=str))
    heights = {
        mark: float(re.search(rf'cmp-dot {mark}" cx="[\d.]+" cy="([\d.]+)"', source)[1]) for mark in ("a0", "a1")
    }  # type: ignore[index]
    assert (heights["a1"] < heights["a0"]) is higher
