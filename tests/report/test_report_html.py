"""The page: one file, no script, a policy that fits its style sheet, and no figure that the record does not hold."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from sample_records import (
    HOSTILE,
    baseline_report,
    findings,
    measurement,
    plan,
    proof,
    run,
    tune_report,
)

from upshift.records import Measurement, Run, TuneReport, unknown
from upshift.report import html

replace = msgspec.structs.replace

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Elements in order, visible text outside charts, and whether every element was closed."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.balanced = True
        self.feed(source)
        self.close()
        self.balanced = self.balanced and not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()
        else:
            self.balanced = False

    def handle_data(self, data: str) -> None:
        if not {"style", "svg", "head"} & set(self.stack):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def pages(script: str = "examples/images.py") -> dict[str, str]:
    return {
        "tune": html.render_tune(tune_report(script), (run(script),)),
        "baseline": html.render_tune(baseline_report()),
        "diagnosis": html.render_diagnosis(measurement(script), findings(), script),
        "run": html.render_run(run(script)),
    }


@pytest.mark.parametrize("kind", ["tune", "baseline", "diagnosis", "run"])
def test_one_file_that_loads_and_runs_nothing(kind: str) -> None:
    source = pages()[kind]
    page = Page(source)
    assert page.balanced
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "img", "audio", "video", "foreignobject"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style"
            if name in ("src", "href", "action", "data", "xlink:href"):
                assert tag == "link" and (value or "").startswith("data:")
    assert "http:" not in source and "https:" not in source and "@import" not in source and "url(" not in source


def test_policy_is_strict_and_names_the_style_by_hash() -> None:
    source = pages()["tune"]
    metas = [a for tag, a in Page(source).elements if tag == "meta" and a.get("http-equiv")]
    policy = metas[0]["content"] or ""
    style = re.findall(r"<style>(.*?)</style>", source, re.S)
    assert len(style) == 1
    expected = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["style-src"] == f"'sha256-{expected}'"
    assert rules["img-src"] == "data:" and "unsafe" not in policy
    assert source.index("Content-Security-Policy") < source.index("<style>")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    report = tune_report(name)
    hostile_trials = tuple(
        replace(t, name=name, reason=name, failure=name, candidate={name: {name: name}}) for t in report.trials
    )
    report = replace(
        report, arguments=(name,), verdict=name, plan_file=name, forecast=name, isolation=name, trials=hostile_trials,
        kept=(name,), findings=tuple(replace(f, title=name, evidence=name, helps=name, edit=name) for f in findings()),
        measurement=replace(measurement(name), machine={name: name}, notes=(name,), syncs_note=name),
        proof=replace(proof(), reason=name, weaker=name),
    )  # fmt: skip
    one = replace(run(name), id=name, plan=name, environment={name: name}, techniques={name: {name: name}})
    one = replace(one, events=tuple(replace(event, kind=name, text=name) for event in one.events))
    for source in (
        html.render_tune(report, (one,), label=name),
        html.render_run(one, label=name),
        html.render_diagnosis(report.measurement, report.findings, name, label=name),
    ):
        page = Page(source)
        assert page.balanced
        assert not {tag for tag, _ in page.elements} & {"script", "img"}
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", source)
        source.encode("utf-8")
        assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|\b49\b", page.text) or "{{" not in name


def test_unknown_is_never_zero() -> None:
    anatomy = measurement().anatomy
    nothing = replace(
        anatomy, step=unknown("s"), warmup=unknown("s"), startup=unknown("s"), evaluation=unknown("s"), warmup_steps=0,
        samples=unknown("samples"), micro_batches=unknown("x"), steps_seen=0,
        phases=tuple(replace(p, seconds=unknown("s"), share=unknown("fraction"), note="") for p in anatomy.phases),
    )  # fmt: skip
    seen = replace(measurement(), anatomy=nothing, floor=None, lines=(), overhead=None, notes=())
    page = Page(html.render_diagnosis(seen, (), "v"))
    assert not re.search(r"(?<![\d.])0(\.0+)?\s*(%|s|ms|us|h|samples)(\W|$)", page.text)
    assert page.text.count("unknown") > 20
    assert "svg" not in {tag for tag, _ in page.elements}
    bare = replace(run(), windows=(), seconds=None, exit_code=None)
    assert not re.search(r"(?<![\d.])0 (ms|s)\b", Page(html.render_run(bare)).text)


def test_what_the_figures_do_not_allow_is_not_claimed() -> None:
    weak = Page(html.render_tune(replace(tune_report(), proof=proof(passed=False))))
    assert "Not shown" in weak.text and "that the result is unharmed is not shown" in weak.text
    hero = next(a for tag, a in weak.elements if tag == "section")
    assert hero["class"] == "hero unproven"
    assert "Keep your baseline" in Page(html.render_tune(baseline_report())).text


def numbers_of(value: Any) -> Iterator[float]:
    """Every number of a record, with half-widths of intervals."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from numbers_of(item)
        if {"value", "low", "high"} <= value.keys() and value["low"] is not None:
            yield (value["high"] - value["low"]) / 2
    elif isinstance(value, list | tuple):
        yield float(len(value))
        for item in value:
            yield from numbers_of(item)


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


FACTORS = {
    "us": 1e-6, "ms": 1e-3, "min": 60.0, "h": 3600.0, "%": 0.01, "GFLOP": 1e9, "GFLOP/s": 1e9, "GB/s": 1e9,
    "s": 1.0, "x": 1.0, "MiB": 2**20, "GiB": 2**30, "k": 1e3,
}  # fmt: skip


def known_numbers(record: TuneReport | Measurement | Run) -> set[float]:
    """The record's numbers, and those computed from it, each by its own plain formula."""
    known = set(numbers_of(msgspec.to_builtins(record)))
    if isinstance(record, Run):
        steps = sum(w.n for w in record.windows)
        step = sum(w.seconds for w in record.windows) / steps
        phases = [sum(w.phases[p] for w in record.windows) / steps for p in record.windows[0].phases]
        known |= {step, 1 / step, float(steps), sum(w.evaluation for w in record.windows)}
        known |= {*phases, *(phase / step for phase in phases)}
        return known
    seen = record.measurement if isinstance(record, TuneReport) else record
    known.add((seen.anatomy.samples.value or 0) / (seen.anatomy.step.value or 1))
    if isinstance(record, TuneReport) and record.final is not None:
        known.add(float(-(-0.42 // (record.final.reference_step - record.final.candidate_step))))  # break-even
        known.add(31.0)  # the smoothing window of 480 steps: a sixteenth of them, odd
    return known


def unexplained(record: TuneReport | Measurement | Run, source: str) -> list[str]:
    """Numbers in the visible text that are neither in the record, nor in one of its texts, nor fixed words."""
    texts = " ".join(strings_of(msgspec.to_builtins(record)))
    if isinstance(record, TuneReport):  # hundreds of losses would explain almost any number
        record = replace(record, proof=replace(proof(losses=False)), trials=tuple(
            replace(t, proof=t.proof and replace(t.proof, stock_losses=(), planned_losses=())) for t in record.trials
        ))  # fmt: skip
    known = known_numbers(record)
    fixed = {"95", "99", "2009", "2026", "11", "21", "0"}
    # A duration such as `2 min 51 s` is one number.
    text = re.sub(r"(\d+) min (\d+) s", lambda m: f"{int(m[1]) * 60 + int(m[2])} s~", Page(source).text)
    result = []
    for match in re.finditer(r"(?<![\w.#])[-+]?(\d[\d,]*\.?\d*(?:e[-+]?\d+)?)(?:\s?([a-zA-Z%/]+))?", text):
        digits, unit = match[1].rstrip(".,"), match[2] or ""
        if digits in fixed or re.search(rf"(?<![\d.]){re.escape(digits)}(?![\d])", texts):
            continue
        value = float(digits.replace(",", ""))
        candidates = {value * FACTORS[unit]} if unit in FACTORS else {value, *(value * f for f in FACTORS.values())}
        whole_seconds = 1.0 if text[match.end() : match.end() + 1] == "~" else 0.0
        last_digit = 10.0 ** -len(digits.partition(".")[2])
        if not any(
            abs(abs(k) - c) <= max(0.005 * c, whole_seconds, 0.51 * last_digit * (c / value if value else 1))
            for k in known
            for c in candidates
        ):
            result.append(match[0])
    return result


SHOWN = {
    "tune": (tune_report(), html.render_tune(tune_report())),
    "diagnosis": (measurement(), html.render_diagnosis(measurement(), (), "verdict")),
    "run": (run(), html.render_run(run())),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_every_number_comes_from_the_record(kind: str) -> None:
    record, source = SHOWN[kind]
    assert unexplained(record, source) == []


@pytest.mark.parametrize(
    ("kind", "shown", "other"),
    [("tune", "61.7 ms", "66.6 ms"), ("tune", "1.71x", "1.93x"), ("diagnosis", "41.2 %", "48.8 %"),
     ("run", "36.1 ms", "33.3 ms")],
)  # fmt: skip
def test_a_foreign_number_would_be_found(kind: str, shown: str, other: str) -> None:
    record, source = SHOWN[kind]
    assert shown in source
    assert unexplained(record, source.replace(shown, other))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_both_themes() -> None:
    """WCAG 2.1 AA: 4.5 for text, 3 for what a chart is read by."""
    css = re.findall(r"<style>(.*?)</style>", pages()["tune"], re.S)[0]
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", blocks[0]))
    dark = light | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", blocks[1]))
    assert light["page"] != dark["page"]
    for theme in (light, dark):
        for text in ("ink", "muted", "accent", "warn", "bad"):
            for ground in ("page", "card", "sunk"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for tone in ("accent", "warn", "bad"):
            assert contrast(theme[tone], theme[f"{tone}-soft"]) >= 4.5, tone
        for name in (key for key in theme if key.startswith("p-")):
            assert contrast(theme[name], theme["on-phase"]) >= 4.5, name
            assert contrast(theme[name], theme["card"]) >= 3, name
        assert contrast(theme["stock"], theme["card"]) >= 3 and contrast(theme["planned"], theme["card"]) >= 3


def test_charts_have_names_and_unique_ids() -> None:
    page = Page(pages()["tune"])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)


def test_attribution_comes_from_the_plan() -> None:
    assert "Worth within the plan" in html.render_tune(tune_report(), plan=plan())
    assert "Worth within the plan" not in html.render_tune(tune_report())


def test_planned_anatomy_comes_from_a_run() -> None:
    without, with_run = html.render_tune(tune_report()), html.render_tune(tune_report(), (run(),))
    assert "With the plan (its run)" not in without and "With the plan (its run)" in with_run
    assert "With the plan (its run)" not in html.render_tune(tune_report(), (run(planned=False),))
