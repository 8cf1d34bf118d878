"""Losses and gradient norms of alternating steps: alike, apart, or not shown."""

from __future__ import annotations

import math
import random

import pytest

from upshift.measure.inrun import Sample, judge_losses, judge_norms

NAMES = ("weight", "bias")


def samples(quads=16, *, scatter=0.1, drift=0.0, loss=1.0, norms=(1.0, 1.0), seed=0):
    """Quads of one step a block; with the technique, loss and norms are these times as large."""
    draw = random.Random(seed)
    found = []
    for number in range(quads):
        first = draw.random() < 0.5
        for place, with_it in enumerate([first, not first, not first, first]):
            trend = math.exp(drift * (4 * number + place))
            value = trend * math.exp(draw.gauss(0, scatter))
            gradients = [trend * size * math.exp(draw.gauss(0, scatter)) for size in (3.0, 0.01)]
            if with_it:
                value, gradients = value * loss, [a * b for a, b in zip(gradients, norms, strict=True)]
            found.append(Sample(number, with_it, value, gradients))
    return found


@pytest.mark.parametrize("drift", [0.0, -0.01])
def test_the_same_training_is_hardly_ever_apart(drift):
    answers = [
        (judge_losses(found).answer, judge_norms(found, NAMES).answer)
        for found in (samples(drift=drift, seed=seed) for seed in range(300))
    ]
    # 0.1 % is stated for the losses, 0.2 % for the norms (as a whole, and of both parameters): 300 sessions of each.
    assert sum(loss == "apart" for loss, _ in answers) <= 3
    assert sum(norm == "apart" for _, norm in answers) <= 4
    assert sum(pair == ("alike", "alike") for pair in answers) > 290


@pytest.mark.parametrize("norms", [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (2.0, 1.0)])
def test_another_length_of_a_gradient_is_seen(norms):
    for seed in range(30):
        assert judge_norms(samples(norms=norms, seed=seed), NAMES).answer == "apart"


def test_a_gradient_that_vanishes_is_named():
    found = judge_norms(samples(norms=(1.0, 0.0)), NAMES)
    assert found.answer == "apart" and "bias has no gradient" in found.reason


@pytest.mark.parametrize("loss", [0.7, 1.3])
def test_another_level_of_the_loss_is_seen(loss):
    for seed in range(30):
        assert judge_losses(samples(loss=loss, seed=seed)).answer == "apart"


def test_what_scatters_too_much_is_not_shown():
    found = samples(quads=6, scatter=1.0)
    assert judge_losses(found).answer == "not shown"
    assert judge_norms(found, NAMES).answer == "not shown"


def test_what_was_not_seen_is_not_shown():
    found = samples(quads=3)
    assert judge_losses(found).answer == "not shown"
    assert judge_norms(found, NAMES).answer == "not shown"
    blind = [item._replace(loss=None, norms=()) for item in samples()]
    assert judge_losses(blind).answer == "not shown"
    assert judge_norms(blind, NAMES).answer == "not shown"


def test_what_is_not_finite_is_apart():
    found = samples()
    found[3] = found[3]._replace(loss=math.nan, norms=[math.inf, 1.0])
    assert judge_losses(found).answer == judge_norms(found, NAMES).answer == "apart"
