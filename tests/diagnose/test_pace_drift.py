"""Steps that take longer than when the plan was made are told; noise is not."""

from __future__ import annotations

import random

import pytest

from upshift.diagnose.pace import LEAST_SECONDS, LEAST_WINDOWS, NAME, alarm, sentence, slower
from upshift.records.plan import Pace
from upshift.records.resources import Head, Sample
from upshift.records.run import Window

PACE = Pace(seconds=0.0123, low=0.0118, high=0.0131, stretches=9)


def run_of(step, seconds=120.0, *, each=1.0, first=0, **more):
    """Windows of about `each` seconds; `step` gives the seconds of a step in the window that begins at a time."""
    windows, at = [], 0.0
    while at < seconds:
        one = step(at)
        n = max(round(each / one), 1)
        at += n * one
        windows.append(Window(first, n, at, n * one, **more))
        first += n
    return windows


def samples(cores_of_others, cores=2.0, seconds=120):
    return [
        Sample(at=float(at), cpu_seconds=1.5 * at, machine_cpu_seconds=(1.5 + cores_of_others) * at)
        for at in range(seconds)
    ], Head(cores=cores)


def test_a_run_that_is_slower_throughout_is_told_with_both_figures():
    found = slower(PACE, run_of(lambda at: 0.0172))
    assert found is not None and found.then == 0.0123 and found.now == pytest.approx(0.0172)
    assert sentence(found) == (
        "steps take 1.40x what they took when this plan was made (12.3 ms then, 17.2 ms now, measured): tune again, "
        "or see `upshift diagnose`"
    )


@pytest.mark.parametrize("step", [0.0123, 0.008, 0.0131, 0.0145])
def test_what_the_plan_saw_itself_and_a_little_more_is_no_cause(step):
    assert slower(PACE, run_of(lambda at: step)) is None


def test_noise_alone_is_never_told():
    draw = random.Random(4)
    for _ in range(200):
        spread = draw.uniform(0.02, 0.5)
        windows = run_of(lambda at, s=spread: PACE.seconds * draw.lognormvariate(0.0, s), 90.0)
        assert slower(PACE, windows) is None


def test_a_neighbour_that_works_for_half_of_the_time_is_no_drift():
    assert slower(PACE, run_of(lambda at: 0.03 if at % 60 < 30 else 0.0123, 240.0)) is None


@pytest.mark.parametrize(("seconds", "each"), [(LEAST_SECONDS / 2, 1.0), (300.0, 300.0 / (LEAST_WINDOWS - 1))])
def test_too_little_seen_says_nothing(seconds, each):
    assert slower(PACE, run_of(lambda at: 0.05, seconds, each=each)) is None
    assert slower(PACE, []) is None


def test_steps_that_fill_a_cache_do_not_count():
    filling = Pace(0.01, 0.01, 0.01, 9, from_step=6000)
    windows = run_of(lambda at: 0.03 if at < 180.0 else 0.01, 300.0, first=70)
    assert slower(filling, windows) is None
    assert slower(Pace(0.01, 0.01, 0.01, 9), windows[:180]) is not None


def test_windows_with_evaluation_or_checkpoints_do_not_count():
    for more in ({"evaluation": 0.5}, {"checkpoint": 0.1}):
        assert slower(PACE, run_of(lambda at: 0.05, **more)) is None


def test_other_programs_are_named_as_the_reason():
    found = slower(PACE, run_of(lambda at: 0.0246))
    busy, head = samples(1.2)
    told = sentence(found, busy, head)
    assert "2.00x" in told and "other programs keep 1.2 of 2 cores busy" in told and "tune again" not in told
    assert "tune again" in sentence(found, *samples(0.05)) and "tune again" in sentence(found, busy, Head())


def test_the_alarm_has_the_time_of_the_last_look():
    looks, head = samples(0.0)
    windows = run_of(lambda at: 0.0246)
    found = alarm(PACE, windows, looks, head)
    assert found is not None and found.name == NAME and found.at == looks[-1].at
    assert alarm(None, windows, looks, head) is None and alarm(PACE, windows, [], head) is None


@pytest.mark.parametrize("odd", [0, -3])
def test_windows_that_make_no_sense_are_passed_over(odd):
    windows = run_of(lambda at: 0.05)
    broken = [Window(0, odd, 1.0, 1.0), Window(0, 5, 1.0, -1.0), Window(0, 5, 1.0, 0.0)]
    assert slower(PACE, broken) is None
    assert slower(PACE, [*windows, *broken]) == slower(PACE, windows)
