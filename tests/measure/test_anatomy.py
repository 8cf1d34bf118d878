"""The anatomy of a step, from records whose phases are known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steps import record

from upshift.measure.anatomy import anatomy
from upshift.records.measurement import PHASES

USUAL = {"data": 1.0, "forward": 2.0, "loss": 0.5, "backward": 4.0, "optimizer": 1.5, "batches": 1, "calls": 1}


def seen(n=40, every=0, **more):
    """`n` steps of 10 s, of which 1 s is nobody's; with `every`, an evaluation of 30 s now and then."""
    records = []
    for i in range(n):
        extra = {"nograd": 30.0, "nograd_calls": 5, "total": 40.0} if every and i % every == every - 1 else {}
        records.append(record(i, **{**USUAL, **more, **extra}))
    return records


def phases(found):
    return {item.name: item.seconds.value for item in found.phases}


def test_phases_are_means_and_sum_to_the_step():
    found = anatomy(seen(), startup=3.0, batch_size=8)
    assert tuple(item.name for item in found.phases) == PHASES
    assert phases(found) == pytest.approx(
        {"data": 1, "h2d": None, "forward": 2, "loss": 0.5, "backward": 4, "optimizer": 1.5, "sync": None, "other": 1}
    )
    assert found.step.value == pytest.approx(10.0)
    assert found.share("backward") == pytest.approx(0.4) and found.share("other") == pytest.approx(0.1)
    assert found.samples.value == 8 and found.startup.value == 3.0 and found.steps_seen == 40


def test_unknown_is_not_zero():
    found = anatomy(seen(), startup=None)
    by_name = {item.name: item for item in found.phases}
    assert not by_name["h2d"].seconds.known and by_name["h2d"].note == "not applicable on CPU"
    assert not found.startup.known and not found.samples.known
    assert not found.evaluation.known and not found.checkpointing.known
    blind = anatomy(seen(batches=0, calls=0, data=0.0, forward=0.0, loss=0.0), startup=None)
    by_name = {item.name: item for item in blind.phases}
    for name in ("data", "forward", "loss"):
        assert not by_name[name].seconds.known and not by_name[name].share.known and by_name[name].note
    assert by_name["other"].seconds.value == pytest.approx(10 - 5.5)
    on_device = anatomy(seen(h2d=0.25), startup=None, on_device=True)
    assert phases(on_device)["h2d"] == pytest.approx(0.25) and phases(on_device)["sync"] == 0.0


def test_evaluation_stands_apart():
    found = anatomy(seen(40, every=10), startup=None)
    assert found.step.value == pytest.approx(10.0)
    assert found.evaluation.value == pytest.approx(120.0) and found.evaluation.n == 4
    assert phases(found)["forward"] == pytest.approx(2.0)


def test_teacher_in_every_step_belongs_to_it():
    found = anatomy(seen(nograd=0.75, nograd_calls=1), startup=None)
    assert found.step.value == pytest.approx(10.0)
    assert phases(found)["forward"] == pytest.approx(2.75) and phases(found)["other"] == pytest.approx(0.25)
    assert not found.evaluation.known


def test_checkpoints_stand_apart():
    records = seen(30)
    records[20] = record(20, **{**USUAL, "total": 60.0, "checkpoint": 50.0})
    found = anatomy(records, startup=None)
    assert found.step.value == pytest.approx(10.0) and found.checkpointing.value == 50.0
    assert found.checkpointing.n == 1


def test_slow_first_steps_are_warm_up():
    records = [record(i, **{**USUAL, "total": 200.0}) for i in range(2)] + [
        record(i, **{**USUAL, "total": 10.0 + 0.01 * (i % 3)}) for i in range(2, 60)
    ]
    found = anatomy(records, startup=None)
    assert found.warmup_steps >= 2 and found.warmup.value >= 400.0
    assert found.step.value == pytest.approx(10.01, abs=0.005)


def test_steps_under_instruments_tell_nothing_about_time():
    records = seen(30)
    records[12] = record(12, **{**USUAL, "total": 500.0})
    found = anatomy(records, startup=None, left_out=frozenset({12}))
    assert found.step.value == pytest.approx(10.0)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_steps(n):
    found = anatomy(seen(n), startup=1.0)
    assert found.steps_seen == n and found.step.n == n - found.warmup_steps
    assert found.step.value == pytest.approx(10.0)


def test_all_steps_left_out_gives_unknown():
    found = anatomy(seen(2), startup=None, left_out=frozenset({0, 1}))
    assert not found.step.known and all(not item.share.known for item in found.phases)


def test_micro_batches():
    assert anatomy(seen(losses=(1.0, 2.0, 3.0, 4.0)), startup=None).micro_batches.value == 4


positive = st.floats(0.0, 10.0)


@given(
    steps=st.lists(st.tuples(positive, positive, positive, positive, positive, positive), min_size=1, max_size=40),
    evaluations=st.sets(st.integers(0, 39)),
)
@settings(max_examples=100, deadline=None)
def test_known_phases_always_sum_to_the_step(steps, evaluations):
    records = []
    for i, (data, forward, loss, backward, optimizer, other) in enumerate(steps):
        more = {"nograd": 2.0, "nograd_calls": 1} if i in evaluations else {}
        total = data + forward + loss + backward + optimizer + other + more.get("nograd", 0.0)
        records.append(record(i, total, data=data, forward=forward, loss=loss, backward=backward, optimizer=optimizer,
                              batches=1, calls=1, **more))  # fmt: skip
    found = anatomy(records, startup=None)
    known = [item.seconds.value for item in found.phases if item.seconds.known]
    assert sum(known) == pytest.approx(found.step.value, abs=1e-9)
    if found.step.value > 0:
        assert sum(item.share.value for item in found.phases if item.share.known) == pytest.approx(1.0)
