"""Pairs of whole runs: intervals against numpy and simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.measure.noninferior import interval, judge, ratio, seeds_needed


def test_interval_is_students():
    values = [0.91, 0.93, 0.90, 0.94]
    found = interval(values, 0.95)
    reach = 2.353363 * np.std(values, ddof=1) / 2  # t quantile, 3 degrees of freedom
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(np.mean(values) - reach, abs=1e-6)
    assert found.high == pytest.approx(np.mean(values) + reach, abs=1e-6)


def test_one_run_has_no_interval_and_none_is_unknown():
    assert (interval([1.0]).low, interval([1.0]).mean) == (None, 1.0)
    assert interval([]).mean is None
    assert judge([0.1], 1.0)[0] == "not shown"


def test_ratio_is_the_geometric_mean():
    found = ratio([2.0, 8.0], [1.0, 1.0])
    assert found.mean == pytest.approx(4.0)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(1e-3, 1))
def test_more_of_everything_is_never_judged_worse(values, margin):
    rank = {"worse": 0, "not shown": 1, "as good": 2}
    assert rank[judge(values, margin)[0]] <= rank[judge([value + 0.5 for value in values], margin)[0]]


def test_a_loss_of_twice_the_margin_is_almost_never_as_good():
    generator = random.Random(0)
    answers = [judge([generator.gauss(-2.0, 1.0) for _ in range(5)], 1.0)[0] for _ in range(2000)]
    at_margin = [judge([generator.gauss(-1.0, 1.0) for _ in range(5)], 1.0)[0] for _ in range(4000)]
    # On the margin itself the error is the level: 5 %, with the error of 4,000 draws.
    assert answers.count("as good") / 2000 < 0.01
    assert abs(at_margin.count("as good") / 4000 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_seeds_that_would_do():
    assert seeds_needed([1.0, -1.0, 0.5, -0.5], 5.0) == 3
    few, many = seeds_needed([1.0, -1.0, 0.5], 1.0), seeds_needed([1.0, -1.0, 0.5], 0.5)
    assert few is not None and many is not None and 3 < few < many
    assert seeds_needed([100.0, -100.0], 1.0) is None
