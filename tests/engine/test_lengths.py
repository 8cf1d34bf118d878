"""Lengths of a training, against counting batches one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.engine.lengths import Span
from upshift.errors import UsageError


def steps_until(samples: int, epoch: int, batch: int) -> int:
    """Steps made when that many samples are consumed, counted batch by batch."""
    consumed = steps = 0
    while consumed < samples:
        left = epoch - consumed % epoch
        consumed += min(batch, left)
        steps += 1
    return steps


@settings(max_examples=150, deadline=None)
@given(samples=st.integers(0, 400), epoch=st.integers(1, 90), batch=st.integers(1, 40))
def test_a_length_in_samples_ends_with_the_step_that_consumes_the_last(samples, epoch, batch):
    span = Span(1000, batch, epoch)
    assert span.count(f"{samples} samples", "length") == steps_until(samples, epoch, batch)


@settings(max_examples=60, deadline=None)
@given(epochs=st.integers(0, 7), epoch=st.integers(1, 90), batch=st.integers(1, 40))
def test_an_epoch_counts_its_incomplete_last_batch(epochs, epoch, batch):
    assert Span(1000, batch, epoch).count(f"{epochs} epochs", "length") == len(range(0, epoch, batch)) * epochs


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (7, 7), ("7 steps", 7), ("1 step", 1), ("1_000 samples", 12), ("2 epochs", 6), ("0.5 epochs", 2), ("5 %", 10),
        ("12.5%", 25), (0.25, 50), (0, 0), (1.0, 200), ("1e2 steps", 100), (" 3 Epochs ", 9),
    ],
)  # fmt: skip
def test_every_way_to_say_a_length(length, steps):
    # 250 samples in batches of 100: three steps an epoch
    assert Span(200, 100, 250).count(length, "length") == steps


def test_samples_of_a_stream_have_no_epochs():
    assert Span(None, 100).count("1_000 samples", "length") == 10


@pytest.mark.parametrize(
    "length",
    ["", "5", "five epochs", "-1 steps", "1.5 steps", "101 %", 1.5, -1, True, None, float("nan"), "5 epochs 3"],
)
def test_what_is_no_length_is_refused_with_the_forms(length):
    with pytest.raises(UsageError, match="steps"):
        Span(200, 100, 250).count(length, "warm_up")


def test_what_is_not_known_is_said():
    with pytest.raises(UsageError, match="samples of an epoch is not known"):
        Span(200, 10).count("5 epochs", "warm_up")
    with pytest.raises(UsageError, match="whole training"):
        Span(None, 10, 100).count("5 %", "warm_up")
    with pytest.raises(UsageError, match="global_batch is 0"):
        Span(200, 0)
