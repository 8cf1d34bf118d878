"""A run with a plan says at its end when its steps were slower than the plan's."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from upshift.hook.pace import MOST_WINDOWS, Pacing
from upshift.measure.steps import StepRecord
from upshift.records.plan import Pace
from upshift.sinks.companion import Windows

PACE = msgspec.to_builtins(Pace(0.01, 0.0099, 0.0103, 8))
FIELDS = dict.fromkeys(StepRecord._fields, 0)


def window(at, n, seconds, **more):
    return StepRecord(**{**FIELDS, "number": 0, "at": at, "total": seconds, "steps": n, "losses": (), **more})


def fed(pacing, windows, step, **more):
    steps = 0
    for number in range(windows):
        steps += 100
        pacing.add(window(float(number), 100, 100 * step, **more), steps)
    return pacing


def test_slower_steps_are_said(tmp_path):
    told = fed(Pacing(PACE), 60, 0.02).remark(tmp_path)
    assert "2.00x what they took when this plan was made (10 ms then, 20 ms now, measured)" in told


@pytest.mark.parametrize(
    ("pace", "step", "more"),
    [(PACE, 0.01, {}), (None, 0.02, {}), (PACE, 0.02, {"nograd": 0.1}), (PACE, 0.02, {"checkpoint": 0.1})],
)
def test_nothing_is_said_without_cause_or_measure(tmp_path, pace, step, more):
    assert fed(Pacing(pace), 60, step, **more).remark(tmp_path) == ""


def test_nothing_is_said_of_steps_without_the_techniques_or_among_other_ranks(tmp_path, monkeypatch):
    pacing = fed(Pacing(PACE), 60, 0.02)
    pacing.came_off()
    assert fed(pacing, 60, 0.02).remark(tmp_path) == ""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fed(Pacing(PACE), 60, 0.02).remark(tmp_path) == ""


def test_a_long_run_is_kept_in_bounded_room_and_still_judged(tmp_path):
    pacing = fed(Pacing(PACE), 10 * MOST_WINDOWS + 7, 0.02)
    kept = pacing._windows
    assert MOST_WINDOWS // 2 <= len(kept) < MOST_WINDOWS
    assert kept[0].first == 0 and all(a.first + a.n == b.first for a, b in pairwise(kept))
    assert "2.00x" in pacing.remark(tmp_path)


def test_other_programs_of_the_record_are_named(tmp_path):
    lines = [{"kind": "head", "cores": 2.0}]
    lines += [
        {"kind": "sample", "at": float(at), "cpu_seconds": at, "machine_cpu_seconds": 1.9 * at} for at in range(9)
    ]
    (tmp_path / "resources.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, lines)) + b"\n")
    assert "other programs keep 0.9 of 2 cores busy" in fed(Pacing(PACE), 60, 0.02).remark(tmp_path)


def test_beside_the_run_it_is_seen_that_techniques_came_off(tmp_path):
    windows = Windows(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind":"start"}\n{"kind":"steps","first":0,"n":5,"at":1.0,"seconds":1.0}\n')
    assert len(windows.read()) == 1 and not windows.changed
    with log.open("a") as file:
        file.write('{"kind":"guard","at":2.0,"text":"the loss is nan"}\n')
    assert len(windows.read()) == 1 and windows.changed


@pytest.mark.parametrize(("step", "said"), [(0.02, True), (0.01, False)])
def test_the_end_of_a_run_says_it_and_the_record_keeps_it(tmp_path, capsys, step, said):
    from watched import watched

    from upshift.hook.guarded import RunController
    from upshift.records.runfold import fold
    from upshift.sites.runner import ChildSpec

    spec = ChildSpec(mode="run", target="train.py", record=str(tmp_path), options={"pace": PACE})
    with watched(RunController(spec), []) as run:
        fed(run.pacing, 60, step)
        run.finish(None)
    assert ("upshift: steps take 2.00x" in capsys.readouterr().err) is said
    assert any(event.kind == "slower" and "tune again" in event.text for event in fold(tmp_path).events) is said
