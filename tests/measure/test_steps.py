"""Sums over one step."""

from __future__ import annotations

import math

import pytest
import torch

from upshift.measure.steps import (
    StepRecord,
    evaluates_apart,
    loss_values,
    median_of,
    total_loss,
    training_seconds,
)


def record(number=0, total=10.0, **more):
    zero = dict.fromkeys(StepRecord._fields, 0.0)
    whole = dict.fromkeys(("nograd_calls", "batches", "epochs", "calls"), 0)
    return StepRecord(
        **{**zero, **whole, "number": number, "at": total * (number + 1), "total": total, "losses": (), **more}
    )


def test_losses_as_floats():
    assert loss_values(record(losses=(1.5, torch.tensor(2.5), torch.tensor([3.0])))) == (1.5, 2.5, 3.0)
    assert loss_values(record(losses=tuple(map(float, range(20))))) == tuple(map(float, range(8)))
    assert loss_values(record()) == ()


@pytest.mark.parametrize(
    ("values", "expected"), [((), None), ((2.0,), 2.0), ((1.0, 2.0, 6.0), 3.0), ((0.1,) * 10, 0.1)]
)
def test_loss_of_a_step_is_the_mean_of_its_backward_passes(values, expected):
    assert total_loss(values) == (expected if expected is None else pytest.approx(expected, rel=1e-15))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_not_a_number(bad):
    assert math.isnan(total_loss((1.0, bad)))


@pytest.mark.parametrize(("with_evaluation", "apart"), [(0, True), (1, True), (5, True), (6, False), (10, False)])
def test_work_without_gradients_in_most_steps_is_part_of_the_step(with_evaluation, apart):
    records = [record(i, nograd_calls=1 if i < with_evaluation else 0) for i in range(10)]
    assert evaluates_apart(records) is apart


def test_nothing_seen_evaluates_apart():
    assert evaluates_apart([]) is True


def test_seconds_of_training():
    item = record(total=10.0, nograd=3.0, checkpoint=2.0)
    assert training_seconds(item) == 5.0
    assert training_seconds(item, apart=False) == 8.0
    assert training_seconds(record(total=1.0, nograd=3.0)) == 0.0


@pytest.mark.parametrize(("values", "expected"), [((), 0.0), ((3.0,), 3.0), ((9.0, 1.0), 5.0), ((5.0, 1.0, 2.0), 2.0)])
def test_median(values, expected):
    assert median_of(values) == expected
