"""How long a search may take that nobody limited."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.search.candidates import DEFAULT_BUDGET, LEAST_BUDGET, Candidate, affordable


def candidate(name: str, gain: float) -> Candidate:
    return Candidate(name=name, settings={}, live=True, gain=gain, reason="")


def test_unknown_length_gets_the_default():
    assert affordable([candidate("a", 2.0)], None, 1.0) == (DEFAULT_BUDGET, None)


def test_half_of_what_is_promised():
    budget, saved = affordable([candidate("a", 1.5)], 600.0, 1.0)
    assert saved == pytest.approx(200.0)
    assert budget == pytest.approx(100.0)


def test_settings_of_one_technique_count_once_and_others_by_their_square_root():
    _, one = affordable([candidate("a", 2.0)], 1000.0, 1.0)
    _, same = affordable([candidate("a", 2.0), candidate("a", 1.8)], 1000.0, 1.0)
    _, more = affordable([candidate("a", 2.0), candidate("b", 1.44)], 1000.0, 1.0)
    assert one == same == pytest.approx(500.0)
    assert more == pytest.approx(1000.0 * (1 - 1 / 2.4))


@given(
    gains=st.lists(st.floats(1.0, 10.0), max_size=8),
    training=st.floats(0.0, 1e7),
    startup=st.floats(0.0, 30.0),
)
def test_between_the_least_and_the_default(gains, training, startup):
    found = [candidate(str(i), gain) for i, gain in enumerate(gains)]
    budget, saved = affordable(found, training, startup)
    assert min(LEAST_BUDGET, DEFAULT_BUDGET) <= budget <= DEFAULT_BUDGET
    assert saved is not None and 0.0 <= saved <= training
    longer, _ = affordable(found, training * 2 + 1, startup)
    assert longer >= budget
