"""The terminal: fits its width, needs no colour, and lets nothing from a record act on it."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from sample_records import (
    CHOSEN,
    HOSTILE,
    anatomy,
    baseline_report,
    findings,
    measurement,
    pairing,
    plan,
    proof,
    run,
    tune_report,
)

from upshift.records import Anatomy, Phase, Quantity, Trial, unknown
from upshift.report import terminal

replace = msgspec.structs.replace


def show(renderable: RenderableType, width: int = 100, **options: object) -> str:
    file = io.StringIO()
    settings: dict[str, object] = {"force_terminal": False, "color_system": None, **options}
    Console(file=file, width=width, **settings).print(renderable)  # type: ignore[arg-type]
    return file.getvalue()


def everything(script: str, width: int) -> list[RenderableType]:
    hostile_findings = tuple(replace(f, title=script, evidence=script, edit=script) for f in findings())
    report = tune_report(script)
    report = replace(
        report,
        verdict=script,
        plan_file=script,
        trials=tuple(replace(t, name=script, reason=script, failure=script, candidate={script: {script: script}})
                     for t in report.trials),
    )  # fmt: skip
    one = run(script)
    one = replace(one, id=script, plan=script, events=tuple(replace(e, text=script, kind=script) for e in one.events))
    chosen = plan()
    chosen = replace(chosen, script=script, verdict=script, kept=tuple(replace(k, note=script) for k in chosen.kept))
    seen = replace(measurement(script, (script,)), notes=(script,), machine={script: script, "cpu": script})
    return [
        terminal.render_diagnosis(seen, hostile_findings, script, width),
        terminal.render_tune(report, script),
        terminal.render_run(one),
        terminal.render_plan(chosen),
    ]


def unknown_anatomy() -> Anatomy:
    names = [phase.name for phase in anatomy().phases]
    return Anatomy(
        step=unknown("s"), phases=tuple(Phase(name, unknown("s"), unknown("fraction")) for name in names),
        steps_seen=0, warmup_steps=0, warmup=unknown("s"), startup=unknown("s"), evaluation=unknown("s"),
        checkpointing=unknown("s"), micro_batches=unknown("micro-batches"), samples=unknown("samples"),
    )  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("script", ["train.py", *HOSTILE])
def test_fits_and_is_harmless(script: str, width: int) -> None:
    for renderable in everything(script, width):
        text = show(renderable, width)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert max(cell_len(line) for line in text.splitlines()) <= width


def test_markup_and_emoji_codes_are_printed_as_they_are() -> None:
    text = show(terminal.render_run(run("[bold red]x[/] :smile: [/nope]")), 120)
    assert "[bold red]x[/] :smile: [/nope]" in text


def test_diagnosis_says_what_was_seen() -> None:
    text = show(terminal.render_diagnosis(measurement(), findings(), "The verdict.", 100))
    for wanted in (
        "The verdict.", "61.4 ms ± 0.6 (n 212)", "waiting for data", "41.2 %", "not applicable on CPU: host to device",
        "examples/images.py:41", "MFU 33.6 % (estimated)", "1.62x (estimated); rests on", "checkpoints unknown",
        "upshift's own cost: 0.4 %",
    ):  # fmt: skip
        assert wanted in re.sub(r"\s+", " ", text)
    longest = max(text.splitlines(), key=lambda line: line.count("█"))
    assert "waiting for data" in longest


def test_unknown_is_never_zero() -> None:
    seen = replace(measurement(), anatomy=unknown_anatomy(), floor=None, lines=(), overhead=None, notes=())
    text = show(terminal.render_diagnosis(seen, (), "", 100))
    assert not re.search(r"(?<![\d.])0(\.0+)?\s*(%|s|ms|us|h|samples)(\W|$)", text)
    assert text.count("unknown") >= 16
    assert "█" not in text and "▏" not in text
    bare = replace(run(), windows=(), seconds=None, steps=0, exit_code=None)
    text = show(terminal.render_run(bare))
    assert "unknown" in text and "0 s" not in text


def test_measured_zero_is_zero() -> None:
    seen = replace(measurement(), anatomy=replace(anatomy(), evaluation=Quantity(0.0, "s", n=1)))
    assert "evaluation 0 s" in re.sub(r"\s+", " ", show(terminal.render_diagnosis(seen, (), "", 100)))


def test_tune_shows_trials_proof_and_ends() -> None:
    text = re.sub(r"\s+", " ", show(terminal.render_tune(tune_report(), "report.html", plan()), 400))
    for wanted in (
        "1.71x faster (99 % bounds 1.68x to 1.75x, 52 quads)", "0.58x", "slower (screen)", "InvalidCxxCompiler",
        "61.7 ms -> 36 ms", "a gain of 1.52 % or more", "lag +0.12 %, at most +0.53 % over 480 steps",
        "(the plan as a whole)", "smallest lag it could have shown 0.41 %", "on top of loader + channels_last",
        "Attribution (secondary", "1.50x faster (99 % bounds 1.45x to 1.54x)", "after 17 steps", "images.plan.toml",
        "report.html",
    ):  # fmt: skip
        assert wanted in text
    assert "Attribution" not in show(terminal.render_tune(tune_report()))


def test_attribution_trials_and_own_proofs_are_shown_where_recorded() -> None:
    own = Trial("fused", {"fused": {}}, {}, "faster", "", "confirm", pairing(1.04, 0.01), proof(losses=False))
    alone = Trial("fused", CHOSEN, {"loader": {}}, "no change", "not resolved", "attribution", pairing(1.018, 0.03))
    report = replace(tune_report(), trials=(own, alone))
    text = re.sub(r"\s+", " ", show(terminal.render_tune(report), 400))
    assert "Attribution (secondary" in text and "not resolved" in text
    assert "52 quads loader, channels_last" in text  # fused has a line of its own


def test_a_verdict_keeps_its_lines() -> None:
    text = show(terminal.render_tune(replace(tune_report(), verdict="first\nsecond")))
    assert "\nfirst" in text and "\nsecond" in text


def test_a_baseline_claims_nothing() -> None:
    text = show(terminal.render_tune(baseline_report()))
    assert "Keep your baseline" in text and "none written" in text
    assert "x faster" not in text and "Proof" not in text and "Attribution" not in text


def test_plan_shows_evidence_and_what_was_turned_down() -> None:
    text = re.sub(r"\s+", " ", show(terminal.render_plan(plan()), 120))
    for wanted in (
        "1.71x (99 % bounds 1.68x to 1.75x, 52 quads)",
        "workers=1",
        "the same bits",
        "worth unknown",
        "bf16",
    ):
        assert wanted in text


def test_no_color_and_plain_ascii() -> None:
    view = terminal.render_diagnosis(measurement(), findings(), "v", 80)
    plain = show(view, 80, force_terminal=True, no_color=True, color_system="standard")
    colour = r"\x1b\[(\d+;)*(3[0-7]|9[0-7])[;m]"
    assert not re.search(colour, plain)
    assert re.search(colour, show(view, 80, force_terminal=True, color_system="standard"))
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
    Console(file=file, width=80, color_system=None).print(view)
    file.flush()
    assert b"####" in raw.getvalue() and b"\\u2588" not in raw.getvalue()
