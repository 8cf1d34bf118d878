"""How long a search may take that nobody limited."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.search.candidates import DEFAULT_BUDGET, Candidate, affordable, promised


def candidate(name: str, gain: float) -> Candidate:
    return Candidate(name=name, settings={}, live=True, gain=gain, reason="")


def test_settings_of_one_technique_count_once_and_others_by_their_square_root():
    one = promised([candidate("a", 2.0)], 1000.0)
    same = promised([candidate("a", 2.0), candidate("a", 1.8)], 1000.0)
    more = promised([candidate("a", 2.0), candidate("b", 1.44)], 1000.0)
    assert one == same == pytest.approx(500.0)
    assert more == pytest.approx(1000.0 * (1 - 1 / 2.4))


def test_nothing_predicted_is_taken_for_ten_percent():
    assert promised([candidate("a", 1.0)], 1100.0) == pytest.approx(100.0)


def test_half_of_what_is_saved_but_enough_to_confirm_something():
    assert affordable(200.0, spent=10.0, least=40.0) == 100.0
    assert affordable(60.0, spent=10.0, least=40.0) == 50.0
    assert affordable(1e6, spent=10.0, least=40.0) == DEFAULT_BUDGET
    assert affordable(39.0, spent=10.0, least=40.0) is None


@given(
    gains=st.lists(st.floats(1.0, 10.0), max_size=8),
    training=st.floats(0.0, 1e7),
    spent=st.floats(0.0, 60.0),
    least=st.floats(10.0, 100.0),
)
def test_longer_trainings_never_buy_less(gains, training, spent, least):
    found = [candidate(str(i), gain) for i, gain in enumerate(gains)]
    saved = promised(found, training)
    assert 0.0 <= saved <= training
    budget = affordable(saved, spent, least)
    longer = affordable(promised(found, 2 * training), spent, least)
    assert budget is None or (longer is not None and longer >= budget)
    assert budget is None or min(spent + least, DEFAULT_BUDGET) <= budget <= DEFAULT_BUDGET
