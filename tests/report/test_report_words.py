"""Numbers and sentences: unknown is a word, rounding is honest, nothing from outside reaches a terminal raw."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import HOSTILE, baseline_report, pairing, plan, proof, tune_report

from upshift.records import Pairing, Proof, Quantity, unknown
from upshift.report import digest, sentences, words


def test_no_torch_no_numpy() -> None:
    code = (
        "import sys, upshift.report\n"
        "from upshift.report import digest, html, sentences, svg, terminal, views, words\n"
        "sys.exit(sorted({'torch', 'numpy'} & set(sys.modules)) != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (Quantity(0.0123, "s", 0.0119, 0.0127, 120), "12.3 ms ± 0.4 (n 120)"),
        (Quantity(0.0123, "s", 0.0122, 0.0140, 120), "12.3 ms (12.2 ms to 14 ms) (n 120)"),
        (Quantity(0.9996, "s"), "1 s"),
        (Quantity(200.0, "s", 190.0, 210.0), "3 min 20 s (3 min 10 s to 3 min 30 s)"),
        (Quantity(0.412, "fraction", 0.404, 0.420), "41.2 % ± 0.8"),
        (Quantity(0.0, "s"), "0 s"),
        (Quantity(1.62, "x", basis="estimated"), "1.62x (estimated)"),
        (Quantity(9.996e11, "FLOP/s"), "1 TFLOP/s"),
        (Quantity(64.0, "samples", n=3), "64 samples (n 3)"),
        (Quantity(2.0**31, "B"), "2 GiB"),
        (unknown("s"), "unknown"),
        (None, "unknown"),
        (Quantity(0.0, "s", basis="unknown"), "unknown"),
        (Quantity(math.nan, "s"), "unknown"),
        (Quantity(math.inf, "fraction"), "unknown"),
        (Quantity(0.00002, "fraction"), "0.002 %"),
        (Quantity(-0.00002, "fraction"), "-0.002 %"),
        (Quantity(9e-8, "fraction"), "0.000009 %"),
        (Quantity(-9e-8, "fraction"), "-0.000009 %"),
    ],
)
def test_quantity_text(quantity: Quantity | None, text: str) -> None:
    assert words.quantity_text(quantity) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_stay_short_and_keep_their_sign(value: float) -> None:
    for text in (words.duration(value), words.percent(value), words.ratio(value), words.number(value)):
        assert len(text) < 40
        assert "inf" not in text and "nan" not in text
        if value < 0 and abs(value) > 1e-3:
            assert text.startswith("-")


@given(st.floats(1e-6, 1e6))
def test_shown_durations_are_within_rounding(value: float) -> None:
    """An independent reading of the text gives the value back to three digits (whole seconds above a minute)."""
    factors = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}
    parts = words.duration(value).split()
    read = sum(float(number) * factors[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))
    assert read == pytest.approx(value, rel=0.03, abs=0.5 if value > 100 else 0)


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_leaves_nothing_that_acts(text: str) -> None:
    shown = words.clean(text)
    assert shown.isprintable() or all(c in "\u200c\u200d" for c in shown if not c.isprintable())
    assert "\x1b" not in shown and "\u202e" not in shown and "\x9b" not in shown
    assert words.clean(text, 50) == shown[:49] + "…" if len(shown) > 50 else shown


def test_clean_drops_whole_sequences_and_keeps_words() -> None:
    assert words.clean("a\x1b[31mred\x1b[0m\x1b]0;title\x07 b\nc") == "ared b c"
    assert words.clean("\x1b]52;c;AAAA\x1b\\after") == "after"
    assert words.clean("训练 é 🧪") == "训练 é 🧪"
    words.clean("\ud800").encode()


@given(st.text(alphabet=st.characters(), max_size=200))
def test_clean_is_idempotent_and_encodable(text: str) -> None:
    once = words.clean(text)
    once.encode("utf-8")
    assert words.clean(once) == once
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in once)


def test_speedup_never_claims_what_the_bounds_exclude() -> None:
    assert words.speedup_text(pairing(1.43, 0.02)).startswith("1.43x faster (99 % bounds 1.40x to 1.46x, 52 quads)")
    assert words.speedup_text(pairing(1.01, 0.02)).startswith("no change told from noise")
    assert words.speedup_text(pairing(0.8, 0.02)).startswith("slower: 0.80x")
    assert words.speedup_text(None) == "speed-up unknown"
    assert words.speedup_text(Pairing(math.nan, 1.2, 1.4, 3)) == "speed-up unknown"
    # A lower bound above the ratio itself is not a figure to boast of.
    assert words.direction(Pairing(0.9, 1.2, 1.4, 3)) != "faster"


def test_place_text() -> None:
    assert words.place_text("train.py", 88) == "train.py:88"
    assert words.place_text("src/a/b/train.py", 88) == "src/a/b/train.py:88"
    assert words.place_text("/home/user/work/demo/train.py", 88) == "…/demo/train.py:88"


def test_proof_text() -> None:
    assert "lag +0.12 %, at most +0.53 % over 480 steps" in words.proof_text(proof())
    assert "smallest lag it could have shown 0.41 %" in words.proof_text(proof())
    failed = words.proof_text(proof(passed=False))
    assert failed.startswith("not shown") and "2.4 %" in failed
    assert words.proof_text(None) == "the result was not checked"
    assert words.rung_name(Proof("none", True, "")) == "not shown"
    assert "unknown" in words.lag_text(Proof("update", True, ""))


def test_claim_needs_speed_and_proof() -> None:
    good = tune_report()
    assert digest.claim(good) == "win"
    assert digest.claim(baseline_report()) == "baseline"
    replace = msgspec.structs.replace
    for change in (
        {"proof": None},
        {"proof": proof(passed=False)},
        {"proof": Proof("none", True, "")},
        {"final": None},
        {"final": pairing(1.01, 0.02)},
        {"final": pairing(0.9, 0.02)},
    ):
        weaker = replace(good, **change)
        assert digest.claim(weaker) == "unproven"
        assert "not shown" in sentences.headline(weaker)


def test_break_even() -> None:
    pair = Pairing(2.0, 1.9, 2.1, 10, reference_step=0.2, candidate_step=0.1)
    assert digest.break_even(10.0, pair) == 100
    assert digest.break_even(0.0, pair) == 0
    assert digest.break_even(None, pair) is None
    assert digest.break_even(10.0, Pairing(1.0, 0.9, 1.1, 10, reference_step=0.2, candidate_step=0.1)) is None
    assert digest.break_even(10.0, Pairing(2.0, 1.9, 2.1, 10)) is None  # step times not recorded
    assert sentences.break_even_text(tune_report()) == "after 17 steps (one-off cost 420 ms)"
    assert sentences.break_even_text(tune_report(), plan()) == "after 17 steps (one-off cost 420 ms)"
    # A cost of 0 in a trial was not recorded: it must not read as "at once".
    free = tuple(msgspec.structs.replace(trial, one_off_seconds=0.0) for trial in tune_report().trials)
    assert sentences.break_even_text(msgspec.structs.replace(tune_report(), trials=free)) == "unknown"


def test_kept_is_what_adds_only_kept_techniques() -> None:
    report = tune_report()
    kept = {trial.name for trial in report.trials if digest.is_kept(report, trial)}
    assert kept == {"loader(workers=1, prefetch=4)", "channels_last", "fused", "loader + channels_last + fused"}
    assert not any(digest.is_kept(baseline_report(), trial) for trial in report.trials)


def test_detail_says_what_the_name_leaves_out() -> None:
    details = {trial.name: sentences.detail_text(trial) for trial in tune_report().trials}
    assert details["loader(workers=1, prefetch=4)"] == ""
    assert details["fused"] == "on top of loader + channels_last"
    assert details["loader + channels_last + fused"] == "loader: workers=1, prefetch=4"


def test_smoothing_against_a_plain_mean() -> None:
    values = [float(v * v % 7) for v in range(40)]
    smoothed = digest.smooth(values, 5)
    for i in range(2, 38):
        assert smoothed[i] == pytest.approx(sum(values[i - 2 : i + 3]) / 5)
    import statistics

    scatter = digest.spread(values, 5)
    for i in range(2, 38):
        assert scatter[i] == pytest.approx(statistics.stdev(values[i - 2 : i + 3]))
    assert digest.spread([1.0, math.nan, 3.0, 5.0, 6.0], 5)[2] == pytest.approx(statistics.stdev([1.0, 3.0, 5.0, 6.0]))
    assert digest.smooth([1.0, math.nan, 3.0], 3) == [1.0, None, 3.0]
