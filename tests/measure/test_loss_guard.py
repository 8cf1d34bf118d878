"""The band of a proof, and the guard that holds a run against it, on simulated losses."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.measure.band import LEAST_STEPS, WINDOWS, band_of
from upshift.measure.guard import LONGEST, Guard
from upshift.records.trial import MOST_WINDOWS

HORIZON = 300


def curve(seed, steps=HORIZON, *, noise=0.1, lag=0.0, start=1):
    """A falling loss with noise of its own; `lag` shifts it along the steps, as another seed does."""
    rng = random.Random(seed)
    return [0.5 + 3.0 * ((t + 10) / (1 + lag)) ** -0.4 + noise * rng.gauss(0, 1) for t in range(start, start + steps)]


BAND, _ = band_of(curve(0))


def signals(losses, band=BAND, first=0):
    guard = Guard(band)
    return guard.add(range(first, first + len(losses)), losses)


def kinds(losses, **more):
    return [item.kind for item in signals(losses, **more)]


# -- the band ---------------------------------------------------------------------------------------------------------


@given(
    losses=st.lists(st.floats(-1e6, 1e6), min_size=LEAST_STEPS, max_size=900), skip=st.sampled_from([0, 12])
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_step_once_and_hold_its_mean(losses, skip):
    band, why = band_of(losses, skip)
    if len(losses) - skip < LEAST_STEPS:
        assert band is None and "too few" in why
        return
    assert why == "" and len(band.first) <= WINDOWS <= MOST_WINDOWS
    ends = [a + n for a, n in zip(band.first, band.length, strict=True)]
    assert band.first == (skip, *ends[:-1]) and ends[-1] == band.horizon == len(losses)
    for a, b, mean in zip(band.first, ends, band.mean, strict=True):
        assert mean == pytest.approx(sum(losses[a:b]) / (b - a), rel=1e-4, abs=1e-6 * max(map(abs, losses)))


def test_spread_is_that_of_single_losses_and_not_of_the_trend():
    band, _ = band_of([10.0 - 0.02 * t + 0.1 * random.Random(t).gauss(0, 1) for t in range(400)])
    assert sum(band.spread) / len(band.spread) == pytest.approx(0.1, rel=0.2)
    still, _ = band_of([3.0 - 0.01 * t for t in range(200)])
    assert max(still.spread) < 1e-9


def test_no_band_of_what_is_not_finite():
    assert band_of([1.0] * 40 + [math.nan])[0] is None


# -- within the band --------------------------------------------------------------------------------------------------


@given(seed=st.integers(1, 10**6), lag=st.floats(-0.25, 0.25), noise=st.floats(0.02, 0.1))
@settings(max_examples=80, deadline=None)
def test_other_seeds_and_quieter_batches_are_no_alarm(seed, lag, noise):
    assert kinds(curve(seed, noise=noise, lag=lag)) == []


@given(seed=st.integers(1, 10**6), below=st.floats(0.0, 3.0))
@settings(max_examples=40, deadline=None)
def test_a_loss_below_the_band_is_never_an_alarm(seed, below):
    """A resumed run begins there."""
    assert kinds([value - below for value in curve(seed)]) == []


@given(seed=st.integers(1, 10**6), begins=st.integers(20, 200))
@settings(max_examples=40, deadline=None)
def test_a_loss_that_goes_back_to_where_it_began_is_an_alarm_soon(seed, begins):
    losses = curve(seed)
    hurt = losses[:begins] + [value + 1.5 for value in losses[begins:]]
    (found,) = signals(hurt)
    assert found.kind == "alarm" and not found.beyond
    assert begins < found.step <= begins + 0.5 * begins + 20
    assert found.loss > found.limit > found.expected


@pytest.mark.parametrize("at", range(10, 290, 7))
def test_one_spike_is_no_alarm(at):
    losses = curve(1)
    losses[at] = 1e4
    assert kinds(losses) == []


def test_two_runs_of_one_lossless_computation_agree_exactly():
    flat, _ = band_of([2.0] * 100)
    assert kinds([2.0] * 400, band=flat) == []
    assert kinds([2.0] * 20 + [2.5] * 80, band=flat) == ["alarm"]


def test_micro_batches_count_as_their_mean():
    rng, losses = random.Random(3), curve(5)
    steps = [t for t in range(HORIZON) for _ in range(4)]
    micro = [losses[t] + rng.gauss(0, 0.2) for t in steps]
    assert Guard(BAND).add(steps, micro) == []
    hurt = [value + (2.0 if t > 150 else 0.0) for t, value in zip(steps, micro, strict=True)]
    assert [item.kind for item in Guard(BAND).add(steps, hurt)] == ["alarm"]


def test_pieces_of_any_length_say_the_same_as_the_whole():
    losses = [value + (2.0 if t > 120 else 0.0) for t, value in enumerate(curve(2))]
    whole = signals(losses)
    rng, guard, found, at = random.Random(0), Guard(BAND), [], 0
    while at < len(losses):
        n = rng.randint(1, 40)
        found += guard.add(range(at, min(at + n, len(losses))), losses[at : at + n])
        at += n
    assert found == whole != []


def test_losses_that_are_not_finite_are_for_somebody_else():
    losses = curve(4)
    losses[::10] = [math.nan] * len(losses[::10])
    assert kinds(losses) == []


# -- what comes after an alarm ----------------------------------------------------------------------------------------


def played(after, *, begins=100, steps=600, harm=1.5):
    """Kinds of what is said where `after(t, reacted at)` is added to the loss once the guard was answered."""
    guard, losses, said, reacted = Guard(BAND), curve(7, steps), [], None
    for t in range(steps):
        added = 0.0 if t < begins else harm if reacted is None else after(t, reacted)
        for item in guard.add([t], [losses[t] + added]):
            said.append(item.kind)
            if item.kind != "back":
                reacted = reacted or t + 1
                guard.changed(t + 1)
        if len(said) > 5:
            break
    return said


def test_the_loss_is_back_once_the_harm_is_gone():
    assert played(lambda t, reacted: 0.0) == ["alarm", "back"]


def test_a_loss_that_heals_slowly_is_waited_for():
    assert played(lambda t, reacted: 1.5 * math.exp(-(t - reacted) / 60)) == ["alarm", "back"]


def test_a_loss_that_stays_up_is_outside_again_and_again():
    assert played(lambda t, reacted: 1.5)[:3] == ["alarm", "outside", "outside"]


def test_nothing_is_judged_between_an_alarm_and_the_answer():
    losses = [value + (2.0 if t > 120 else 0.0) for t, value in enumerate(curve(2, 900))]
    assert kinds(losses) == ["alarm"]


# -- beyond the band --------------------------------------------------------------------------------------------------

LONG = 6000


def long(shape, seed=11, noise=0.1):
    rng = random.Random(seed)
    return [shape(t) + noise * rng.gauss(0, 1) for t in range(LONG)]


def base(t):
    return 0.5 + 3.0 * (t + 11) ** -0.4


CALM = {
    "goes on falling": base,
    "plateau": lambda t: max(base(t), base(500)),
    "restarts of the learning rate": lambda t: base(t) + 0.4 * math.exp(-(t % 1000) / 150) * (t > 999),
    "hard and easy stretches": lambda t: base(t) + 0.2 * math.sin(t / 30),
    "epochs of a memorised set": lambda t: base(t) - 0.15 * (t // 400 if t < 2400 else 6),
    "slow creep upwards": lambda t: base(t) + 0.00003 * t,
}


@pytest.mark.parametrize("name", CALM)
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_what_training_usually_does_later_is_no_alarm(name, noise):
    band, _ = band_of(long(CALM[name], 12, noise)[:HORIZON])
    assert kinds(long(CALM[name], 11, noise), band=band) == []


def test_a_resumed_run_at_its_floor_may_wander_there():
    resumed = [0.01 + 0.2 * (t // 200 % 3 == 2) + 0.002 * random.Random(t).gauss(0, 1) for t in range(LONG)]
    assert kinds(resumed) == []


def test_rare_spikes_are_no_alarm():
    rng = random.Random(9)
    losses = [value + (rng.expovariate(0.2) if rng.random() < 0.02 else 0.0) for value in long(base)]
    assert kinds(losses, band=band_of(losses[:HORIZON])[0]) == []


@pytest.mark.parametrize("begins", [800, 3000])
def test_divergence_after_the_horizon_is_an_alarm(begins):
    losses = long(lambda t: base(t) + (0.01 * (t - begins) if t > begins else 0.0))
    found = signals(losses)[0]
    assert found.kind == "alarm" and found.beyond
    assert begins < found.step < begins + 5 * LONGEST


def test_another_training_in_the_same_process_begins_anew():
    """A second fold: the loss is back at its start."""
    guard, losses = Guard(BAND), curve(1, 1200)
    assert guard.add(range(1200), losses) == []
    guard.restart(1200)
    assert guard.add(range(1200, 2400), losses) == []
    unaware = Guard(BAND)
    assert unaware.add(range(2400), losses + [value + 0.5 for value in losses]) != []
