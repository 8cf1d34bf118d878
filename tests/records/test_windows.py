"""Windows read many at a time are those read one at a time, and sums of them are plain sums."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.records.run import Window
from upshift.records.windows import Reader, merged, thin, whole

figure = st.floats(0, 1e6)
name_sets = [(), ("data",), ("data", "forward", "other"), ("other", "forward"), ("class", "x"), ("not a name", "_y")]


@st.composite
def windows(draw, names):
    made = []
    for first in range(draw(st.integers(1, 6))):
        chosen = draw(names)
        made.append(Window(
            first, draw(st.integers(-1, 5)), draw(figure), draw(figure), {name: draw(figure) for name in chosen},
            draw(st.none() | figure), draw(st.none() | figure), draw(figure), draw(figure),
        ))  # fmt: skip
    return made


@given(st.lists(windows(st.sampled_from(name_sets)), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_many_at_a_time_are_the_same_whatever_phases_they_name(blocks):
    reader = Reader()
    for block in blocks:
        assert [whole(item) for item in reader.read(msgspec.json.encode(block))] == block


@given(windows(st.just(("data", "forward", "other"))), windows(st.sampled_from(name_sets)))
@settings(max_examples=25, deadline=None)
def test_sums_of_lean_windows_are_those_of_whole_ones(alike, mixed):
    reader = Reader()
    reader.read(msgspec.json.encode(alike))
    lean = reader.read(msgspec.json.encode(alike))
    assert not isinstance(lean[0], Window), "the second block with the same phases needs no dictionaries"
    assert whole(merged(lean)) == merged(alike) and list(map(whole, thin(lean))) == thin(alike)
    for block in (alike, mixed):
        found, known = merged(block), [item for item in block if item.loss is not None]
        assert found.first == block[0].first and found.at == block[-1].at and found.n == sum(i.n for i in block)
        assert math.isclose(found.seconds, math.fsum(i.seconds for i in block), abs_tol=1e-9)
        for name in {name for item in block for name in item.phases}:
            assert math.isclose(found.phases[name], math.fsum(i.phases.get(name, 0.0) for i in block), abs_tol=1e-9)
        if len(block) > 1 and known:
            mean = math.fsum(i.loss * max(i.n, 1) for i in known) / sum(max(i.n, 1) for i in known)
            assert math.isclose(found.loss, mean, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("text", [b"[{}]", b"[1]", b"nonsense", b'[{"first":0,"n":1,"at":1,"seconds":1,"kind":"x"}]'])
def test_what_is_no_window_is_refused_before_and_after_phases_are_known(text):
    reader = Reader()
    good = msgspec.json.encode([Window(0, 1, 1.0, 1.0, {"data": 0.5, "other": 0.5})])
    for _ in range(3):
        with pytest.raises(msgspec.DecodeError):
            reader.read(text)
        assert len(reader.read(good)) == 1


def test_phases_that_change_for_ever_are_still_read():
    reader = Reader()
    for number in range(60):
        window = Window(number, 1, 1.0, 1.0, {f"phase{number}": 1.0, "other": 2.0})
        assert [whole(item) for item in reader.read(msgspec.json.encode([window]))] == [window]
