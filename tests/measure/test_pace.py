"""The pace of a plan: what its confirmation keeps of the time of a step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.measure.pace import LEAST_STRETCHES, pace_of
from upshift.records.plan import Pace


@given(step=st.floats(1e-3, 3.0), stretches=st.integers(LEAST_STRETCHES + 3, 9))
def test_equal_steps_have_that_pace_and_no_spread(step, stretches):
    count = math.ceil(stretches * max(1.0, step) / step / 0.74) + 2
    found = pace_of([step] * count)
    assert found is not None and found.stretches >= LEAST_STRETCHES
    assert found.seconds == pytest.approx(step) and found.low == pytest.approx(step) == found.high


@given(st.lists(st.floats(0.1, 2.0), min_size=60, max_size=200))
def test_the_pace_lies_between_the_fastest_and_the_slowest_step(seconds):
    found = pace_of(seconds)
    assert found is not None
    assert min(seconds) * 0.999 <= found.low <= found.seconds <= found.high <= max(seconds) * 1.001


def test_a_slow_first_quarter_is_not_in_it():
    assert pace_of([5.0] * 25 + [0.5] * 75) == Pace(0.5, 0.5, 0.5, 37)


def test_a_step_in_ten_that_is_slow_is_in_every_stretch():
    # Ten steps fill a second: each stretch holds one that begins an epoch.
    found = pace_of(([0.1] * 9 + [0.6]) * 20)
    assert found is not None and found.low == pytest.approx(0.15) and found.high == pytest.approx(0.15)


@pytest.mark.parametrize("seconds", [[], [0.01] * 50, [math.nan] * 50, [0.0] * 50, [1.0, 1.0, 1.0]])
def test_too_little_is_no_pace(seconds):
    assert pace_of(seconds) is None


@pytest.mark.parametrize("figures", [(1.0, 2.0, 3.0), (2.0, 1.0, 1.5), (0.0, 0.0, 0.0), (1.0, 1.0, math.inf)])
def test_figures_out_of_order_are_refused(figures):
    with pytest.raises(ValueError, match="pace"):
        Pace(*figures, 4)
