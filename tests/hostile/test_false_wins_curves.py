"""Losses that prove nothing: constant, zero, memorised, broken, hidden, or too good."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from arms import curve

from upshift.measure.lag import lag
from upshift.records import Proof
from upshift.records.trial import UpdateCheck
from upshift.search.accept import accept
from upshift.search.alike import parted
from upshift.search.confirm import judge
from upshift.search.duel import Arm
from upshift.sites import Numerics

AGREE = [UpdateCheck(step, 1.0, 1.0, 1e-4, 1.0, passed=True) for step in (1, 2, 10)]


def said(stock: list[float], planned: list[float], numerics: Numerics = Numerics.ROUNDING, **more: Any) -> Proof:
    """The proof of two loss curves whose compared updates all agree."""
    arguments = {"bitwise_equal": stock == planned, "updates": AGREE, "losses_seen": True, **more}
    if numerics is Numerics.ROUNDING:
        arguments["bitwise_equal"] = None
    return accept(numerics, lag=lag(stock, planned), **arguments)


def shown(found: Proof) -> bool:
    """Whether the curve counts as evidence."""
    return found.passed and found.rung in ("trajectory", "bitwise")


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
@pytest.mark.parametrize("numerics", [Numerics.ROUNDING, Numerics.RESEEDS])
def test_a_loss_that_never_changes_is_no_trajectory(value: float, numerics: Numerics) -> None:
    found = said([value] * 100, [value] * 100, numerics, **({"bitwise_equal": None}))
    assert not shown(found) and (not found.passed or "never changes" in found.weaker)


def test_a_loss_that_is_nearly_zero_from_the_start_is_no_trajectory() -> None:
    rng = random.Random(1)
    stock = [abs(rng.gauss(0, 1e-9)) for _ in range(100)]
    found = said(stock, [value + abs(rng.gauss(0, 1e-9)) for value in stock])
    assert not shown(found) and (not found.passed or found.weaker)


def test_a_loss_memorised_within_the_horizon_is_no_trajectory() -> None:
    rng = random.Random(1)
    stock = [2.3 * math.exp(-t / 8) * (1 + 0.05 * rng.random()) for t in range(100)]
    found = said(stock, [value * 1.002 for value in stock])
    assert not shown(found) and (not found.passed or "floor" in found.weaker)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("numerics", list(Numerics))
def test_a_planned_loss_that_breaks_once_is_no_win(bad: float, numerics: Numerics) -> None:
    stock = curve()
    planned = [bad if t == 150 else value for t, value in enumerate(stock)]
    assert not said(stock, planned, numerics).passed


def test_a_script_whose_own_loss_is_not_finite_proves_nothing() -> None:
    stock = [*curve(50), math.nan, *curve(50)]
    assert not said(stock, curve(101)).passed


@pytest.mark.parametrize("every", [10, 20, 33])
def test_skipped_steps_are_a_lag(every: int) -> None:
    """One step in `every` does nothing: the curve of a run that has made fewer steps."""
    rng = random.Random(2)

    def at(made: float) -> float:
        return 1.2 + 3.3 * (made + 1) ** -0.3

    noise = [rng.gauss(0, 0.05) for _ in range(300)]
    stock = [at(t) + noise[t] for t in range(300)]
    planned = [at(t - max(t - 12, 0) // every) + noise[t] + rng.gauss(0, 3e-4) for t in range(300)]
    assert not said(stock, planned).passed


def test_a_harm_that_begins_late_is_seen_while_it_is_compared() -> None:
    stock = curve(200)
    planned = [value + (0.004 * (t - 120) if t > 120 else 1e-5) for t, value in enumerate(stock)]
    assert not said(stock, planned).passed


def test_a_scaled_loss_cannot_hide_that_steps_are_left_out() -> None:
    """A lag of five per cent, made invisible by a loss that is told a little smaller."""
    stock = curve(200)
    late = [value + (3.3 * ((t / 1.05) ** -0.3 - t**-0.3) if t > 12 else 0.0) for t, value in enumerate(stock, 1)]
    planned = [value * 0.992 for value in late]
    a, b = arm(stock), arm(planned)
    assert "first loss" in parted(a, b, Numerics.ROUNDING)


def test_a_loss_that_falls_too_fast_is_another_loss() -> None:
    stock = curve(200)
    better = [value + 3.3 * ((t * 1.05) ** -0.3 - t**-0.3) for t, value in enumerate(stock, 1)]
    assert "faster per step than stock" in said(stock, better).reason
    rng = random.Random(5)
    flat = [2.0 + rng.gauss(0, 0.05) for _ in range(100)]
    assert "faster per step than stock" in said(flat, [value - 0.05 for value in flat]).reason


def test_an_explosion_in_the_last_steps_is_no_win() -> None:
    stock = curve(120)
    assert not said(stock, [value + (5.0 if t > 110 else 1e-5) for t, value in enumerate(stock)]).passed


def test_two_losses_that_work_against_one_another_are_no_trajectory() -> None:
    found = said(curve(), [value + 1e-5 for value in curve()], several_optimizers=True)
    assert not shown(found) and "several optimizers" in found.weaker


def test_updates_that_nobody_compared_are_no_proof() -> None:
    still = [UpdateCheck(1, 1.0, 1.0, 0.0, None, worst="(no parameter moved)", passed=True)]
    for updates in ([], still):
        assert not said(curve(), [value + 1e-6 for value in curve()], updates=updates).passed


# -- what the arms did ------------------------------------------------------------------------------------------------


def arm(losses: list[float], backwards: int = 1, epoch: int = 0) -> Arm:
    """An arm after these losses."""
    made = Arm(0, None, {})  # type: ignore[arg-type]
    for step, value in enumerate(losses):
        made.seconds[step], made.losses[step], made.backwards[step] = 0.01, [value] * backwards, backwards
        if epoch and step % epoch == 0:
            made.epoch_starts.append((step, 0.0))
    return made


def judged(a: Arm, b: Arm, **more: Any) -> Proof:
    arguments: dict[str, Any] = {
        "numerics": Numerics.ROUNDING, "checks": AGREE, "paired": True, "has_dropout": False, "ended": True, **more,
    }  # fmt: skip
    return judge(None, a, b, **arguments)  # type: ignore[arg-type]


def test_losses_hidden_from_the_backward_call_are_no_proof() -> None:
    """The plan's steps, or those of both arms, call backward on something that is no scalar."""
    plain, hidden = arm(curve(60)), arm(curve(60))
    for step in range(20, 60):
        hidden.losses[step] = []
    assert "no loss was seen" in judged(plain, hidden).reason
    hidden.losses = {step: [] for step in hidden.losses}
    assert "no loss was seen" in judged(hidden, hidden).reason


def test_micro_batches_that_are_left_out_are_no_win() -> None:
    found = judged(arm(curve(60), backwards=4), arm(curve(60), backwards=3))
    assert not found.passed and "3 losses at backward calls, 4 in the untouched script" in found.reason


def test_an_epoch_cut_short_is_no_win() -> None:
    found = judged(arm(curve(60), epoch=20), arm(curve(60), epoch=19))
    assert not found.passed and "an epoch starts at step 20" in found.reason


def test_arms_that_begin_from_other_parameters_prove_nothing() -> None:
    found = judged(arm(curve(60)), arm(curve(60)), paired=False)
    assert not found.passed and "same parameters" in found.reason


def test_constant_losses_are_not_the_same_bits() -> None:
    """A loss divided by itself is always one: identical losses say nothing of the parameters."""
    found = judged(arm([1.0] * 60), arm([1.0] * 60), numerics=Numerics.BITWISE)
    assert not found.passed and "bits were not compared" in found.reason
