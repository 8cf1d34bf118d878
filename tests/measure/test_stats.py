"""Step-time statistics against scipy and against simulation with known truth."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.measure.paired import Sequential, arm_steps, estimate, pairing, quad_log_ratios
from upshift.measure.ranks import bounds
from upshift.measure.stats import (
    batch_means,
    break_even_steps,
    detect_warmup,
    long_run_variance,
    mean_interval,
    narrow_enough,
    normal_quantile,
    t_quantile,
    t_tail,
)


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "proof_simulation.py"
    spec = importlib.util.spec_from_file_location("proof_simulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Student's t


def test_t_quantiles_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 5, 8, 20, 100, 1000):
        for p in (0.001, 0.3, 0.6, 0.9, 0.99, 0.999, 1 - 1e-6):
            assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-6)
            assert t_tail(t_quantile(p, df), df) == pytest.approx(1 - p, rel=1e-6)
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(("p", "df"), [(0.0, 5), (1.0, 5), (0.9, 0.5)])
def test_t_quantile_refuses_what_has_no_value(p: float, df: float) -> None:
    with pytest.raises(ValueError, match="0 < p < 1"):
        t_quantile(p, df)


# Means of correlated step times


def test_mean_interval_covers_the_mean_of_correlated_steps() -> None:
    rng = random.Random(1)
    missed = naive = 0
    for _ in range(400):
        value, steps = rng.gauss(0, 1), []
        for _ in range(400):
            value = 0.8 * value + 0.6 * rng.gauss(0, 1)
            steps.append(10 + value)
        found = mean_interval(steps)
        assert found.low is not None and found.high is not None
        missed += not found.low <= 10 <= found.high
        spread = math.sqrt(sum((s - found.value) ** 2 for s in steps) / 399 / 400)  # type: ignore[operator]
        naive += abs(found.value - 10) > 1.966 * spread  # type: ignore[operator]
    assert naive > 100, "the series must be one that a plain t interval fails on"
    assert missed <= 40


def test_mean_interval_of_few_or_broken_values() -> None:
    assert not mean_interval([]).known
    assert not mean_interval([math.nan]).known
    short = mean_interval([1.0, 3.0])
    assert (short.value, short.low, short.n) == (2.0, None, 2)
    assert mean_interval([1.0, math.inf, 1.0, 1.0, 1.0]).n == 4
    assert not narrow_enough(short)


def test_narrow_enough_is_about_the_half_width() -> None:
    rng = random.Random(2)
    steps = [rng.gauss(1.0, 0.1) for _ in range(400)]
    found = mean_interval(steps)
    assert found.low is not None and found.high is not None and found.value is not None
    half = (found.high - found.low) / 2 / found.value
    assert narrow_enough(found, half * 1.01) and not narrow_enough(found, half * 0.99)


def test_long_run_variance_inflates_only_for_positive_correlation() -> None:
    rng = random.Random(3)
    white = [rng.gauss(0, 1) for _ in range(5000)]
    walk, value = [], 0.0
    for noise in white:
        value = 0.8 * value + noise
        walk.append(value)
    plain = sum(v * v for v in walk) / len(walk)
    assert long_run_variance(walk, lags=3) > 2 * plain
    alternating = [(-1) ** i * 1.0 + 0.01 * w for i, w in enumerate(white)]
    assert long_run_variance(alternating) >= 0.99
    assert batch_means([1, 2, 3, 4, 5, 6, 7, 8], most=2) == [2.5, 6.5]


# Warm-up


def test_warmup_finds_compilation_ramps_and_nothing_in_noise() -> None:
    rng = random.Random(4)
    steady = [0.03 * math.exp(rng.gauss(0, 0.03)) for _ in range(100)]
    assert detect_warmup(steady) == 0
    assert detect_warmup([0.9, *steady]) == 1
    assert detect_warmup([0.9, 0.03, 0.8, *steady]) == 3, "a recompile after a good step is warm-up too"
    ramp = [0.03 * (1 + 2 * math.exp(-i / 8)) for i in range(40)]
    assert 12 <= detect_warmup([*ramp, *steady]) <= 45
    assert detect_warmup([1.0, 1.0, 1.0]) == 0


@given(st.lists(st.floats(1e-4, 10.0), max_size=80))
def test_warmup_never_exceeds_half(steps: list[float]) -> None:
    assert 0 <= detect_warmup(steps) <= len(steps) // 2


def test_break_even() -> None:
    assert break_even_steps(94.0, 0.032, 0.021) == pytest.approx(94.0 / 0.011)
    assert break_even_steps(0.0, 0.032, 0.021) == 0.0
    assert break_even_steps(94.0, 0.02, 0.02) is None
    assert break_even_steps(94.0, 0.02, 0.03) is None


# Quads


def test_linear_drift_cancels_inside_a_quad() -> None:
    for arms in ("ABBA", "BAAB"):
        blocks = [(arm, (1.0 if arm == "A" else 0.5) + 0.2 * i) for i, arm in enumerate(arms)]
        # A drift added to both arms leaves the ratio they have in the middle of the quad.
        assert quad_log_ratios(blocks) == [pytest.approx(math.log(1.3 / 0.8))]
    flat = [(arm, 0.03 * (1 + 0.1 * i)) for i, arm in enumerate("ABBABAAB")]
    assert quad_log_ratios(flat) == [pytest.approx(0.0, abs=1e-12)] * 2


def test_positive_means_the_candidate_is_faster() -> None:
    assert quad_log_ratios([("A", 2.0), ("B", 1.0), ("B", 1.0), ("A", 2.0)]) == [pytest.approx(math.log(2))]


def test_incomplete_and_broken_quads_are_left_out() -> None:
    quad = [("A", 2.0), ("B", 1.0), ("B", 1.0), ("A", 2.0)]
    assert quad_log_ratios(quad[:3]) == []
    assert len(quad_log_ratios([*quad, ("B", 1.0), *quad])) == 2
    assert quad_log_ratios([("A", math.nan), *quad[1:]]) == []
    assert quad_log_ratios([("A", 0.0), *quad[1:]]) == []
    assert arm_steps(quad) == (2.0, 1.0)
    assert arm_steps([]) == (0.0, 0.0)


# Pairing


def test_bounds_hold_their_level_under_drift_spikes_and_steal(simulation: ModuleType) -> None:
    for n in (4, 8, 20, 60):
        rng = random.Random(10 + n)
        low = high = 0
        for _ in range(500):
            source = simulation.quads(rng, 1.1)
            found = pairing([next(source)[0] for _ in range(n)])
            low += found.low > 1.1
            high += found.high < 1.1
        assert low <= 12 and high <= 12, (n, low, high)


def test_smallest_is_what_would_be_seen(simulation: ModuleType) -> None:
    rng = random.Random(5)
    sizes = []
    for _ in range(100):
        source = simulation.quads(rng, 1.0)
        sizes.append(pairing([next(source)[0] for _ in range(40)]).smallest or 0.0)
    gain = sorted(sizes)[50]
    seen = 0
    for _ in range(200):
        source = simulation.quads(rng, 1.0 + gain)
        seen += pairing([next(source)[0] for _ in range(40)]).low > 1.0
    assert 160 <= seen <= 199


def test_a_candidate_that_stalls_now_and_then_is_not_called_faster() -> None:
    # 10 % faster, but every tenth block of the candidate takes three times as long: slower on the whole.
    rng = random.Random(6)
    blocks, count = [], 0
    for _ in range(100):
        for arm in "ABBA" if rng.random() < 0.5 else "BAAB":
            seconds = math.exp(rng.gauss(0, 0.01))
            if arm == "B":
                count += 1
                seconds *= 0.9 * (3.0 if count % 10 == 0 else 1.0)
            blocks.append((arm, seconds))
    found = pairing(quad_log_ratios(blocks))
    assert found.ratio == pytest.approx(1 / (0.9 * 1.2), rel=0.03)
    assert found.low < 1.0
    assert "stalls" in found.method


def test_pairing_refuses_too_little() -> None:
    with pytest.raises(ValueError, match="four"):
        pairing([0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match="finite"):
        pairing([0.1, 0.1, 0.1, math.nan])


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=60), st.floats(-1, 1))
def test_pairing_is_ordered_and_follows_a_shift(quads: list[float], shift: float) -> None:
    found = pairing(quads)
    assert found.low <= found.ratio <= found.high
    moved = estimate([value + shift for value in quads])
    here = estimate(quads)
    if here.method == moved.method == "trimmed mean of ABBA quads":
        assert moved.value == pytest.approx(here.value + shift, abs=1e-9)
    mirrored = estimate([-value for value in quads])
    assert mirrored.value == pytest.approx(-here.value, abs=1e-9)


# Sequential looks


def test_false_wins_stay_below_one_percent_with_optional_stopping(simulation: ModuleType) -> None:
    # The hardest case: a true ratio right at the threshold, looked at repeatedly.
    rng = random.Random(7)
    wins = sum(simulation.session(rng, 1.01, 10.0)[0] == "faster" for _ in range(500))
    assert wins <= 11
    wins = sum(simulation.session(rng, 1.0, 10.0)[0] == "faster" for _ in range(300))
    assert wins <= 1
    slower = sum(simulation.session(rng, 1.0, 10.0)[0] == "slower" for _ in range(300))
    assert slower <= 8


def test_a_gain_of_three_percent_is_found_in_twenty_seconds(simulation: ModuleType) -> None:
    rng = random.Random(8)
    found = [simulation.session(rng, 1.03, 20.0) for _ in range(100)]
    assert sum(decision == "faster" for decision, _, _ in found) >= 90
    big = [simulation.session(rng, 1.5, 20.0) for _ in range(50)]
    assert all(decision == "faster" for decision, _, _ in big)
    assert sum(seconds for _, seconds, _ in big) / 50 < 3.0, "a large gain must stop early"


def test_a_slower_arm_stops_early(simulation: ModuleType) -> None:
    rng = random.Random(9)
    found = [simulation.session(rng, 0.8, 60.0) for _ in range(50)]
    assert all(decision in ("slower", "no change") for decision, _, _ in found)
    assert max(seconds for _, seconds, _ in found) < 20.0


def test_the_interval_of_a_stopped_test_covers(simulation: ModuleType) -> None:
    rng = random.Random(11)
    missed = 0
    for _ in range(300):
        shown = simulation.session(rng, 1.02, 8.0)[2].pairing((0.032, 0.031))
        assert shown is not None and shown.reference_step == 0.032
        missed += not shown.low <= 1.02 <= shown.high
    assert missed <= 12


def test_nothing_is_decided_on_too_little() -> None:
    test = Sequential(10.0)
    assert [test.add(0.5, 0.1 * i) for i in range(1, 6)] == ["go on"] * 5
    assert test.pairing() is None
    short = Sequential(10.0)
    assert short.add(0.5, 11.0) == "go on"  # up to twice the time for what can show something
    assert short.add(0.5, 21.0) == "no change"
    assert short.add(0.5, 22.0) == "no change"
    assert len(short.quads) == 2


@pytest.mark.parametrize("quads", [5, 8, 16, 40])
def test_noise_that_happens_to_agree_is_no_gain(quads: int) -> None:
    # A stall of always the same length, on a side that is drawn: Student's t alone is wrong in 11 % to 18 % of these.
    rng = random.Random(quads)
    wrong = 0
    for _ in range(2000):
        test = Sequential(2.0)
        for i in range(quads):
            test.add(rng.choice((-1, 1)) * rng.uniform(0.10, 0.14), 1.999 * (i + 1) / quads)
        wrong += test.finish() == "faster"
    assert wrong <= 30  # 1 % of 2,000, and 99 % of what chance adds


def test_a_busy_machine_needs_more_quads() -> None:
    rng = random.Random(7)
    quiet, busy = Sequential(10.0), Sequential(10.0)
    for i in range(1, 13):
        quiet.add(0.5 + rng.gauss(0, 0.02), 9.9 * i / 12)
        busy.add(4.0 + rng.gauss(0, 1.0), 9.9 * i / 12)
    assert quiet.decision == "faster"
    assert busy.finish() == "no change"
    found = busy.pairing()
    assert found is not None and found.low <= 1.0 <= found.high and "busy" in found.method
    for i in range(200):
        busy = busy if i else Sequential(10.0)
        busy.add(4.0 + rng.gauss(0, 1.0), 9.9 * i / 200)
    assert busy.finish() == "faster"


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=25, unique=True), st.sampled_from([0.01, 0.05])
)  # fmt: skip
def test_rank_bounds_are_the_signed_rank_test_turned_round(values: list[int], tail: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    low, high = bounds(values, tail)
    if math.isinf(low):
        assert 2.0 ** -len(values) > tail
        return
    # Averages of two are multiples of a half: there are no ties at the shifts.
    for shift, inside in ((low - 0.25, False), (low + 0.25, True)):
        found = scipy_stats.wilcoxon([value - shift for value in values], alternative="greater", method="exact")
        assert (found.pvalue > tail) == inside
    assert bounds([-value for value in values], tail) == pytest.approx((-high, -low))
    with pytest.raises(ValueError, match="unusable"):
        Sequential(0.0)


def test_values_that_are_not_finite_are_no_evidence() -> None:
    test = Sequential(10.0)
    for i in range(50):
        test.add(math.nan, 0.01 * i)
    assert test.quads == [] and test.decision == "go on"


def test_a_long_measurement_stays_cheap() -> None:
    # Counted in calls to the estimate rather than in time: looks grow geometrically.
    test = Sequential(1e9)
    rng = random.Random(12)
    looks, last = 0, None
    for i in range(1, 501):
        test.add(rng.gauss(0.005, 0.5), float(i) * 1e5)
        if test.pairing() is not None and test.pairing() is not last:
            looks += test._look is not last
            last = test._look
    assert 5 <= looks <= 30
