"""The lag of paired loss curves against curves whose lag is known."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.measure.lag import LEAST_STEPS, MARGIN, lag, slope


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "proof_simulation.py"
    spec = importlib.util.spec_from_file_location("proof_simulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def power_law(steps: int, late: float = 0.0) -> list[float]:
    return [1.2 + 3.3 * (t / (1 + late)) ** -0.3 for t in range(1, steps + 1)]


def test_slope_agrees_with_least_squares() -> None:
    np = pytest.importorskip("numpy")
    rng = np.random.default_rng(0)
    t = np.arange(21, 201)
    losses = 2 + 5 * t**-0.5 + rng.normal(0, 0.05, len(t))
    u = np.log(t)
    design = np.stack([np.ones_like(u), u, u * u], 1)
    fit, *_ = np.linalg.lstsq(design, losses, rcond=None)
    found = slope(losses.tolist(), 21, 46)
    assert found.mean == pytest.approx(-np.mean(fit[1] + 2 * fit[2] * u[46:]), rel=1e-9)
    rest = losses - design @ fit
    functional = np.array([0, 1, 2 * np.mean(u[46:])])
    plain = math.sqrt(rest @ rest / (len(t) - 3) * (functional @ np.linalg.inv(design.T @ design) @ functional))
    assert plain <= found.error * 1.0001 and found.error < 2 * plain
    assert found.mean == pytest.approx(np.mean(2.5 * t[46:] ** -0.5), rel=0.25)


@pytest.mark.parametrize("steps", [20, 60, 200])
@pytest.mark.parametrize("true", [-0.03, 0.005, 0.02, 0.10])
def test_a_shifted_curve_has_the_lag_it_was_shifted_by(steps: int, true: float) -> None:
    found = lag(power_law(steps), power_law(steps, true))
    assert found.lag == pytest.approx(true, rel=0.15)
    assert found.low is not None and found.high is not None and found.low <= found.lag <= found.high
    assert found.non_inferior == (true < MARGIN)
    assert found.inferior == (true > MARGIN)


def test_identical_losses_have_no_lag_whatever_the_curve() -> None:
    for losses in (power_law(50), [1.0] * 50, [0.0] * 50, [2.0, 1.0]):
        found = lag(losses, list(losses))
        assert (found.lag, found.high, found.identical, found.non_inferior) == (0.0, 0.0, True, True)


def test_acceptance_and_false_acceptance(simulation: ModuleType) -> None:
    rng = random.Random(1)
    for steps, wander, true, least, most in (
        (200, 1.0, 0.0, 0.88, 1.0),
        (60, 1.0, 0.0, 0.75, 1.0),
        (200, 1.0, 0.02, 0.0, 0.01),
        (60, 1.0, 0.02, 0.0, 0.01),
        (20, 1.0, 0.02, 0.0, 0.01),
        (200, 5.0, 0.02, 0.0, 0.03),
        (200, 30.0, 0.02, 0.0, 0.05),
        (200, 30.0, 0.10, 0.0, 0.01),
    ):
        found = [lag(*simulation.curves(rng, true, steps, wander)) for _ in range(150)]
        share = sum(item.non_inferior for item in found) / len(found)
        assert least <= share <= most, (steps, wander, true, share)


def test_smallest_says_how_fine_the_evidence_is(simulation: ModuleType) -> None:
    rng = random.Random(2)
    fine = lag(*simulation.curves(rng, 0.0, 200, 1.0))
    coarse = lag(*simulation.curves(rng, 0.0, 200, 30.0))
    assert fine.smallest is not None and coarse.smallest is not None
    assert fine.smallest < 0.02 < coarse.smallest
    assert fine.high == pytest.approx((fine.lag or 0.0) + fine.smallest)


def test_a_flat_curve_shows_nothing_but_an_excess() -> None:
    rng = random.Random(3)
    stock = [2.0 + rng.gauss(0, 0.1) for _ in range(100)]
    same = lag(stock, [value + rng.gauss(0, 1e-4) for value in stock])
    assert same.flat and same.lag is None and not same.non_inferior
    assert same.excess_low is not None and same.excess_low < 0.001
    higher = lag(stock, [value + 0.1 for value in stock])
    assert higher.flat and higher.excess_low == pytest.approx(0.05, rel=0.1)
    rising = [1.0 + 0.01 * t for t in range(100)]
    assert lag(rising, [value * 0.999 for value in rising]).flat


def test_a_memorised_curve_shows_nothing() -> None:
    stock = [2.3 * math.exp(-t / 10) for t in range(100)]
    found = lag(stock, [value * 1.001 for value in stock])
    assert found.flat and "floor" in found.reason and not found.non_inferior
    negative = [value - 5.0 for value in stock]
    assert "floor" not in lag(negative, [value + 1e-6 for value in negative]).reason


def test_a_late_fall_is_seen_from_the_early_part() -> None:
    rng = random.Random(4)
    stock = [max(4.5 - 0.15 * t, 1.5) + rng.gauss(0, 0.05) for t in range(60)]
    assert not lag(stock, [value + 1e-5 * rng.random() for value in stock]).flat


def test_broken_and_short_losses_say_why() -> None:
    stock = power_law(50)
    for broken in (math.nan, math.inf, -math.inf):
        planned = [*stock[:-1], broken]
        found = lag(stock, planned)
        assert not found.finite and found.inferior and not found.non_inferior and found.lag is None
        back = lag(planned, stock)
        assert back.finite and back.lag is None and not back.non_inferior and "stock" in back.reason
    for steps in range(LEAST_STEPS):
        short = lag(stock[:steps], power_law(steps, 0.1))
        assert short.lag is None and not short.non_inferior and short.reason
    assert lag(stock, power_law(30, 0.001)).steps == 30


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([20, 33, 120]), st.floats(1e-6, 0.1), st.floats(1.0, 50.0))
def test_a_lag_scales_with_the_difference(seed: int, steps: int, size: float, factor: float) -> None:
    rng = random.Random(seed)
    stock = [value + rng.gauss(0, 0.02) for value in power_law(steps)]
    difference = [size * rng.gauss(0.3, 1.0) for _ in stock]
    once = lag(stock, [a + b for a, b in zip(stock, difference, strict=True)])
    more = lag(stock, [a + factor * b for a, b in zip(stock, difference, strict=True)])
    assert once.flat == more.flat
    if once.lag is not None and once.low is not None and more.lag is not None and more.low is not None:
        assert more.lag == pytest.approx(factor * once.lag, rel=1e-6, abs=1e-9)
        assert more.low == pytest.approx(factor * once.low, rel=1e-6, abs=1e-9)
