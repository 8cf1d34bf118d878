"""Early stopping against torch's plateau counter, and the overfitting alarm on curves whose truth is known."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.engine.stopping import EarlyStop, OverfittingAlarm, _line
from upshift.errors import UsageError

VALUES = st.lists(st.floats(-10, 10) | st.just(float("nan")), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(values=VALUES, mode=st.sampled_from(["max", "min"]), delta=st.sampled_from([0.0, 0.5]))
def test_best_and_patience_are_those_of_torchs_plateau(values, mode, delta):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, patience=10**6, threshold=delta, threshold_mode="abs"
    )
    stopper = EarlyStop("score", patience=4, min_delta=delta, mode=mode).begin()
    for value in values:
        plateau.step(value)
        stops = stopper.update({"score": value})
        assert stopper.since == plateau.num_bad_epochs
        assert stops == (plateau.num_bad_epochs >= 4)
        if stopper.best is not None:
            assert stopper.best == plateau.best


@settings(max_examples=50, deadline=None)
@given(values=VALUES, cut=st.integers(0, 30))
def test_a_stopper_goes_on_from_its_state(values, cut):
    rule = EarlyStop("loss", patience=3)
    whole, part = rule.begin(), rule.begin()
    for at, value in enumerate(values):
        if at == cut:
            again = rule.begin()
            again.load_state_dict(json.loads(json.dumps(part.state_dict())))
            part = again
        assert whole.update({"loss": value}, at) == part.update({"loss": value}, at)
    assert whole.state_dict() == part.state_dict()


def test_the_best_is_remembered_with_its_step():
    stopper = EarlyStop("accuracy", patience=2).begin()
    told = [stopper.update({"accuracy": value, "loss": 1.0}, step) for step, value in ((10, 0.5), (20, 0.7), (30, 0.7))]
    assert told == [False, False, False]
    assert (stopper.best, stopper.best_at) == (0.7, 20)
    assert stopper.update({"accuracy": 0.6}, 40)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="patience"):
        EarlyStop(patience=0)
    with pytest.raises(UsageError, match="min_delta"):
        EarlyStop(min_delta=-1)
    with pytest.raises(UsageError, match="mode"):
        EarlyStop(mode="up")
    with pytest.raises(UsageError, match="watches 'f1'"):
        EarlyStop("f1").begin().update({"loss": 1.0})
    with pytest.raises(UsageError, match="window"):
        OverfittingAlarm(window=2)


def alarms(training, evaluation, **settings):
    alarm = OverfittingAlarm(**settings)
    found = [alarm.update(10 * at, a, b) for at, (a, b) in enumerate(zip(training, evaluation, strict=True), start=1)]
    return [item for item in found if item]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12))
def test_the_line_is_numpys(values):
    slope, error = _line(values)
    places = np.arange(len(values))
    expected, constant = np.polyfit(places, values, 1)
    assert slope == pytest.approx(expected, abs=1e-9)
    rest = np.sum((np.asarray(values) - constant - expected * places) ** 2)
    spread = np.sum((places - places.mean()) ** 2)
    assert error == pytest.approx(np.sqrt(rest / (len(values) - 2) / spread), abs=1e-7)


def falling(n, draw, noise=0.01):
    return [2 * 0.93**at + draw.gauss(0, noise) for at in range(n)]


def test_noise_alone_seldom_alarms():
    draw = random.Random(0)
    trainings = 400
    false = sum(bool(alarms(falling(50, draw), [1 + draw.gauss(0, 0.05) for _ in range(50)])) for _ in range(trainings))
    # A chance of 0.001 at each of 44 evaluations, less what overlapping windows share
    assert false / trainings <= 0.044


def test_a_loss_that_still_falls_never_alarms():
    draw = random.Random(1)
    curves = [[2 * 0.95**at + draw.gauss(0, 0.01) for at in range(40)] for _ in range(200)]
    assert sum(bool(alarms(falling(40, draw), curve)) for curve in curves) <= 2


def test_a_rise_beyond_its_noise_alarms_once_and_names_the_best():
    draw = random.Random(2)
    seen = 0
    for _ in range(100):
        # falls for 15 evaluations, then rises by one noise a step
        curve = [1 + 0.02 * abs(at - 15) + draw.gauss(0, 0.01) for at in range(40)]
        found = alarms(falling(40, draw), curve)
        if found:
            seen += 1
            assert len(found) == 1
            first = found[0]
            assert first.step >= 160 and 110 <= first.best_step <= 200
            assert first.rise > first.half_width > 0 and first.fall > 0
            assert "overfitting" in first.text() and f"step {first.best_step}" in first.text()
    assert seen >= 95


def test_a_rise_while_training_does_not_fall_is_something_else():
    draw = random.Random(3)
    rising = [1 + 0.05 * at for at in range(7)]  # one look
    wrong = sum(bool(alarms([1 + draw.gauss(0, 0.01) for _ in range(7)], rising)) for _ in range(1000))
    assert wrong <= 20  # a chance of 0.01 each
    assert not alarms([1 + 0.1 * at for at in range(7)], rising)
    assert alarms([1 - 0.1 * at for at in range(7)], rising)


def test_an_alarm_goes_on_from_its_state_and_leaves_out_what_is_not_finite():
    curve = [1 + 0.02 * abs(at - 8) for at in range(20)]
    training = [2 * 0.9**at for at in range(20)]
    curve.insert(12, float("nan"))
    training.insert(12, float("inf"))
    whole, part = OverfittingAlarm(), OverfittingAlarm()
    found = []
    for at, pair in enumerate(zip(training, curve, strict=True)):
        again = OverfittingAlarm()
        again.load_state_dict(json.loads(json.dumps(part.state_dict())))
        part = again
        found.append((whole.update(at, *pair), part.update(at, *pair)))
    assert all(first == second for first, second in found)
    assert sum(first is not None for first, _ in found) == 1
