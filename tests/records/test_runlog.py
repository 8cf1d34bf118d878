"""The log of a run: readable whatever happened to it, folded exactly."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.errors import EnvironmentError_, RecordError
from upshift.records import runfold, runlog
from upshift.records.run import Window
from upshift.records.runfold import fold
from upshift.records.runlog import LOG, RunLog

START = {"script": "train.py", "arguments": ["--lr", "1"], "started": "2026-01-01 00:00:00", "pid": 2**22 + 5}


def started(folder, **more):
    log = RunLog(folder)
    log.append("start", **{**START, **more})
    return log


def window(first, n=1, seconds=1.0, **more):
    return {"first": first, "n": n, "at": float(first + n), "seconds": seconds, **more}


def test_a_whole_run(tmp_path):
    log = started(tmp_path / "run", techniques={"threads": {"count": 2}}, environment={"cpu": "x"})
    log.append("applied", at=0.5, text="threads: 2")
    log.append("steps", **window(0, 4, phases={"data": 0.25}, loss=2.0, last_loss=1.5))
    log.append("steps", **window(4, 2, seconds=0.5, evaluation=0.1))
    log.append("end", code=0, seconds=7.0, how="ended by itself", steps=6)
    log.close()
    run = fold(tmp_path / "run")
    assert (run.status, run.exit_code, run.seconds, run.steps) == ("finished", 0, 7.0, 6)
    assert run.arguments == ("--lr", "1") and run.techniques == {"threads": {"count": 2}}
    assert run.events[0].text == "threads: 2" and run.windows[0].phases == {"data": 0.25}
    assert run.torn_lines == 0 and not run.guard_fired


@pytest.mark.parametrize(("code", "status"), [(0, "finished"), (1, "failed"), (130, "interrupted"), (None, "failed")])
def test_status_from_the_exit_code(tmp_path, code, status):
    log = started(tmp_path)
    log.append("end", code=code, seconds=1.0)
    assert fold(tmp_path).status == status


def test_status_without_an_end(tmp_path):
    started(tmp_path / "gone")
    assert fold(tmp_path / "gone").status == "unknown"
    started(tmp_path / "here", pid=os.getpid())
    assert fold(tmp_path / "here").status == "running"
    # A process that began after the log has only been given the same number.
    started(tmp_path / "reused", pid=os.getpid(), clock=1000.0)
    assert fold(tmp_path / "reused").status == "unknown"
    for number, pid in enumerate((0, -1, 2**70)):
        started(tmp_path / str(number), pid=pid)
        try:
            assert fold(tmp_path / str(number)).status in ("unknown", "running")
        except RecordError:
            assert pid == 2**70


@given(cut=st.integers(0, 400), junk=st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_cut_anywhere_it_reads_what_is_whole(tmp_path_factory, cut, junk):
    folder = tmp_path_factory.mktemp("run")
    log = started(folder)
    for i in range(3):
        log.append("steps", **window(i))
    log.close()
    whole = (folder / LOG).read_bytes()
    first = whole.index(b"\n") + 1
    cut = min(cut, len(whole) - first)
    (folder / LOG).write_bytes(whole[: len(whole) - cut] + junk)
    run = fold(folder)
    kept = whole[first : len(whole) - cut].count(b"\n")
    # A cut right before a line break leaves the line whole.
    assert kept <= run.steps <= kept + 1
    assert run.torn_lines <= 1 + junk.count(b"\n")


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 100, b"{}", b'{"kind": "start"}', b'{"kind": 3}', b"[1]\n" * 5,
                                     b'{"kind": "end", "code": 0}', b"[" * 100_000, b"x" * 3_000_000])  # fmt: skip
def test_what_is_no_log(tmp_path, content):
    (tmp_path / LOG).write_bytes(content)
    with pytest.raises(RecordError) as error:
        fold(tmp_path)
    assert error.value.remedy


def test_no_folder(tmp_path):
    with pytest.raises(RecordError, match="No such file"):
        fold(tmp_path / "nowhere")


def test_lines_of_another_kind_are_counted_not_trusted(tmp_path):
    log = started(tmp_path)
    log.append("steps", **window(0))
    log.append("steps", first="x", n=1)
    log.append("steps", **{**window(1), "unknown_field": 1})
    log.append("applied", at="soon", text=3)
    log.append("new kind of event", at=1.0)
    run = fold(tmp_path)
    assert run.torn_lines == 3 and run.steps == 1 and run.events[-1].kind == "new kind of event"


def test_folder_and_file_are_private(tmp_path):
    old = os.umask(0)
    try:
        RunLog(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b" / LOG).stat().st_mode & 0o777 == 0o600


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_) as error:
        RunLog(tmp_path / "file" / "run")
    assert "--runs" in error.value.remedy


def test_write_cut_short_spoils_one_line_only(tmp_path, monkeypatch):
    log = started(tmp_path)
    real = os.write
    monkeypatch.setattr(runlog.os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    log.append("steps", **window(0))
    assert "space" in log.broken
    monkeypatch.setattr(runlog.os, "write", real)
    log.append("steps", **window(1))
    run = fold(tmp_path)
    assert run.torn_lines == 1 and [item.first for item in run.windows] == [1]


def test_descriptor_closed_by_the_script_is_never_written_again(tmp_path):
    log = started(tmp_path / "run")
    os.close(log._fd)
    own = os.open(tmp_path / "checkpoint.pt", os.O_WRONLY | os.O_CREAT)
    assert own == log._fd
    log.append("steps", **window(0))
    log.close()
    os.write(own, b"x")  # still open: close() left it alone
    os.close(own)
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"x"
    assert log.broken and fold(tmp_path / "run").steps == 0


losses = st.one_of(st.none(), st.integers(-9, 9))
sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2**20), losses), min_size=1, max_size=60)


@given(sizes=sizes, most=st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_merging_keeps_every_sum(tmp_path_factory, sizes, most):
    folder = tmp_path_factory.mktemp("run")
    log = started(folder)
    first = 0
    for n, seconds, loss in sizes:
        more = {"phases": {"data": seconds / 4, "forward": 0.5}, "evaluation": n / 2, "checkpoint": 0.25, "loss": loss}
        log.append("steps", **window(first, n, float(seconds), **more))
        first += n
    log.close()
    kept = runfold.MOST_WINDOWS
    runfold.MOST_WINDOWS = most
    try:
        run = fold(folder)
    finally:
        runfold.MOST_WINDOWS = kept
    assert len(run.windows) <= most + 1
    assert run.steps == first == sum(item.n for item in run.windows)
    assert [item.first for item in run.windows] == [sum(w.n for w in run.windows[:i]) for i in range(len(run.windows))]
    assert sum(item.seconds for item in run.windows) == sum(seconds for _, seconds, _ in sizes)
    assert sum(item.phases["data"] for item in run.windows) == sum(seconds / 4 for _, seconds, _ in sizes)
    assert sum(item.evaluation for item in run.windows) == sum(n / 2 for n, _, _ in sizes)
    if all(loss is not None for *_, loss in sizes):
        total = sum(item.loss * item.n for item in run.windows)
        assert total == pytest.approx(sum(loss * n for n, _, loss in sizes), abs=1e-9)


def test_a_million_steps_stay_small(tmp_path):
    log = started(tmp_path)
    lines = (json.dumps({"kind": "steps", **window(i)}) for i in range(20_000))
    os.write(log._fd, ("\n".join(lines) + "\n").encode())
    run = fold(tmp_path)
    assert len(run.windows) <= runfold.MOST_WINDOWS and run.steps == 20_000
    assert isinstance(run.windows[0], Window)
