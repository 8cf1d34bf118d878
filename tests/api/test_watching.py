"""A run that is read while it grows: the same as read at the end, whatever is torn, thinned, replaced or gone."""

from __future__ import annotations

import json
import os
import shutil
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.api import watching
from upshift.errors import RecordError
from upshift.hardware.rates import Rates
from upshift.records import resources, runfold, tail
from upshift.records.runfold import Incremental, fold
from upshift.records.runlog import LOG, RunLog
from upshift.records.tail import MAX_LINE, SPOILT, Tail

START = {"script": "train.py", "arguments": [], "started": "2026-01-01 00:00:00", "pid": 2**22 + 5}


def line(kind: str, **fields: object) -> bytes:
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def window(first: int, n: int = 1, **more: object) -> bytes:
    return line("steps", first=first, n=n, at=float(first + n), seconds=float(n), **more)


def started(folder, **more: object) -> RunLog:
    log = RunLog(folder)
    log.append("start", **{**START, "clock": time.time(), **more})
    return log


def add(folder, *lines: bytes, name: str = LOG) -> None:
    with open(folder / name, "ab") as file:
        file.write(b"".join(lines))


def sample(at: float, **more: object) -> bytes:
    return line("sample", at=at, cpu_seconds=2 * at, **more)


# -- the log -----------------------------------------------------------------------------------------------------------

pieces = st.lists(
    st.one_of(
        st.integers(1, 9).map(lambda n: ("steps", n)),
        st.sampled_from([("event", 0), ("junk", 0), ("blank", 0), ("restart", 0), ("end", 0), ("torn", 0)]),
    ),
    max_size=60,
)


def written(items: list[tuple[str, int]]) -> bytes:
    whole, first = line("start", **START), 0
    for kind, n in items:
        if kind == "steps":
            whole += window(first, n, phases={"data": n / 4}, loss=float(n) if n % 2 else None)
            first += n
        elif kind == "event":
            whole += line("metrics", at=1.0, text="acc", step=first, values={"acc": first / 7})
        elif kind == "restart":
            whole += line("start", **{**START, "arguments": ["again"]})
        elif kind == "end":
            whole += line("end", code=0, seconds=9.0)
        else:
            whole += {"junk": b"[1]\n", "blank": b"\n", "torn": b'{"kind": "ste\n'}[kind]
    return whole


@given(items=pieces, cuts=st.lists(st.integers(0, 10_000), max_size=12), most=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_read_in_pieces_it_is_what_it_is_as_a_whole(tmp_path_factory, items, cuts, most):
    folder = tmp_path_factory.mktemp("run")
    whole = written(items)
    edges = [0, *sorted(cut % len(whole) for cut in cuts), len(whole)]
    (folder / LOG).touch()
    kept, runfold.MOST_WINDOWS = runfold.MOST_WINDOWS, most
    try:
        reading = Incremental(folder)
        for a, b in pairwise(edges):
            add(folder, whole[a:b])
            assert reading.advance()
        assert reading.run() == fold(folder)
        steps = sum(n for kind, n in items if kind == "steps")
        assert sum(item.n for item in reading.run().windows) == steps
    finally:
        runfold.MOST_WINDOWS = kept


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    started(tmp_path)
    add(tmp_path, *(window(i) for i in range(500)))
    seen: list[bytes] = []
    real = runfold._Folded.lines
    monkeypatch.setattr(runfold._Folded, "lines", lambda self, lines: (seen.extend(lines), real(self, lines)))
    reading = Incremental(tmp_path)
    reading.advance()
    assert len(seen) == 501
    reading.advance()
    assert len(seen) == 501
    add(tmp_path, window(500))
    reading.advance()
    assert len(seen) == 502 and reading.run().steps == 501


def test_a_long_run_is_kept_equally_fine_from_its_first_step_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setattr(runfold, "MOST_WINDOWS", 64)
    started(tmp_path)
    add(tmp_path, *(window(i, loss=float(i)) for i in range(20_000)))
    kept = fold(tmp_path).windows
    sizes = [item.n for item in kept[:-1]]
    assert 32 <= len(kept) <= 65 and max(sizes) <= 2 * min(sizes)
    assert all(item.loss == pytest.approx(item.first + (item.n - 1) / 2) for item in kept)


def test_a_line_that_is_still_being_written_waits(tmp_path):
    started(tmp_path)
    half = window(0)
    add(tmp_path, half[:20])
    reading = Incremental(tmp_path)
    reading.advance()
    assert reading.run().steps == 0 and reading.run().torn_lines == 0
    add(tmp_path, half[20:])
    reading.advance()
    assert reading.run().steps == 1 and reading.run().torn_lines == 0


def test_a_log_that_is_replaced_is_read_anew(tmp_path):
    started(tmp_path)
    add(tmp_path, *(window(i) for i in range(9)))
    reading = Incremental(tmp_path)
    reading.advance()
    os.replace(tmp_path / LOG, tmp_path / "old")
    started(tmp_path, script="other.py")
    reading.advance()
    assert (reading.run().script, reading.run().steps) == ("other.py", 0)
    os.truncate(tmp_path / LOG, 0)
    reading.advance()
    with pytest.raises(RecordError):
        reading.run()


@pytest.mark.parametrize("cut", [1, 1000, MAX_LINE, MAX_LINE + 5, 3 * MAX_LINE])
def test_an_endless_line_is_one_spoilt_line(tmp_path, cut):
    reading = Tail(tmp_path / "file")
    long = b"x" * (3 * MAX_LINE + 7)
    (tmp_path / "file").write_bytes(b"a\n" + long[:cut])
    found = []
    for more in (b"", long[cut:], b"yz\nb\n"):
        add(tmp_path, more, name="file")
        for _ in range(6):
            found += reading.read()
        assert len(reading._rest) <= MAX_LINE
    assert found == [b"a", SPOILT, b"b"] and reading.last() == []


def test_head_and_tail_of_a_long_log_show_how_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(runfold, "GLIMPSE", 10_000)
    started(tmp_path, pid=os.getpid(), steps_planned=9000)
    add(tmp_path, *(window(i, loss=1.0) for i in range(3000)))
    add(tmp_path, line("metrics", at=1.0, text="acc", step=3000, values={"acc": 0.5}), b'{"kind":"st')
    reading = Incremental(tmp_path)
    view = reading.glimpse()
    assert (view.run.steps, view.run.status, view.run.steps_planned) == (3000, "running", 9000)
    assert view.run.torn_lines == 0 and view.metrics.values == {"acc": 0.5}
    assert view.recent[-1].first == 2999 and len(view.run.windows) < 500
    reading.advance()
    assert reading.view().share == 1.0 and sum(item.n for item in reading.view().run.windows) == 3000


@given(count=st.integers(0, 40), size=st.integers(200, 4000))
@settings(max_examples=40, deadline=None)
def test_a_glimpse_of_a_short_log_is_all_of_it(tmp_path_factory, count, size):
    folder = tmp_path_factory.mktemp("run")
    started(folder)
    add(folder, *(window(i) for i in range(count)))
    kept, runfold.GLIMPSE = runfold.GLIMPSE, size
    try:
        view = Incremental(folder).glimpse()
    finally:
        runfold.GLIMPSE = kept
    assert view.run.steps == count and view.run.torn_lines == 0
    if (folder / LOG).stat().st_size <= 2 * size:
        assert view.run == fold(folder)


def test_a_job_that_goes_on_in_its_folder_runs_again(tmp_path):
    started(tmp_path, pid=os.getpid())
    add(tmp_path, window(0), line("end", code=143, seconds=1.0))
    assert fold(tmp_path).status == "failed"
    started(tmp_path, pid=os.getpid())
    view = watching.Watching(tmp_path, Rates()).look()
    assert view.run.status == "running" and view.run.exit_code is None
    assert view.recent == () and view.run.steps == 1 and view.run.seconds is None


def test_how_many_steps_are_planned(tmp_path):
    started(tmp_path)
    assert fold(tmp_path).steps_planned is None
    add(tmp_path, line("planned", steps=700), line("planned", steps="many"), line("planned"), line("planned", steps=-1),
        line("planned", steps=10**400))  # fmt: skip
    assert fold(tmp_path).steps_planned == 700 and fold(tmp_path).torn_lines == 4


# -- the samples -------------------------------------------------------------------------------------------------------


def test_samples_are_those_that_are_read_at_the_end(tmp_path):
    sampled = watching.Sampled(tmp_path)
    assert sampled.advance(1.0) and sampled.resources() is None
    add(tmp_path, line("head", cores=4.0), *(sample(float(i)) for i in range(500)), b"[1]\n", b"3\n", b'{"kind": 3}\n',
        line("sample", at="soon"), line("alarm", at=1.0, name="swap", text="memory is short"), b'{"kind": "sample"',
        name=resources.FILE)  # fmt: skip
    sampled.advance(1.0)
    found = sampled.resources()
    assert found.torn_lines == 4 and found.head.cores == 4.0 and found.alarms[0].name == "swap"
    assert [item.at for item in found.samples] == list(range(500))
    add(tmp_path, b', "at": 500}\n', line("end", overhead_seconds=0.5), name=resources.FILE)
    sampled.advance(1.0)
    at_the_end = resources.read(tmp_path)
    assert sampled.resources().samples == at_the_end.samples
    assert sampled.resources().overhead_seconds == at_the_end.overhead_seconds == 0.5


def test_thinned_samples_keep_the_sums_and_the_present(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "MOST_SAMPLES", 50)
    monkeypatch.setattr(watching, "RECENT_SAMPLES", 20)
    add(tmp_path, line("head"), *(sample(float(i)) for i in range(5000)), name=resources.FILE)
    sampled = watching.Sampled(tmp_path)
    sampled.advance(1.0)
    found = [item.at for item in sampled.resources().samples]
    assert found[-20:] == list(range(4980, 5000)) and len(found) <= 121 and found == sorted(set(found))
    gaps = [b - a for a, b in pairwise(found[:-20])]
    assert len(set(gaps)) == 1


# -- watching ----------------------------------------------------------------------------------------------------------


def test_a_run_is_watched_until_it_ends(tmp_path):
    log = started(tmp_path, pid=os.getpid())
    add(tmp_path, line("head", cores=2.0), sample(0.0), sample(1.0), name=resources.FILE)
    looks = watching.watch(tmp_path, every=0.001, rates=Rates())
    assert next(looks).run.steps == 0
    log.append("steps", first=0, n=7, at=1.0, seconds=1.0)
    moment = next(looks)
    assert moment.run.steps == 7 and moment.share == 1.0 and len(moment.resources.samples) == 2
    assert moment.elapsed is not None and 0 <= moment.elapsed < 60 and moment.silent < 60
    assert moment.ledger.cost.value.value is None
    log.append("end", code=3, seconds=2.5)
    rest = list(looks)
    assert [item.run.status for item in rest] == ["failed"] and rest[0].elapsed == 2.5


def test_a_folder_that_vanishes_ends_the_watching_with_a_sentence(tmp_path):
    folder = tmp_path / "run"
    started(folder, pid=os.getpid())
    looks = watching.watch(folder, every=0.001, rates=Rates())
    next(looks)
    shutil.rmtree(folder)
    with pytest.raises(RecordError) as error:
        next(looks)
    assert error.value.remedy and str(folder) in error.value.message


def test_a_process_that_is_gone_is_over_once_its_log_is_silent(tmp_path):
    started(tmp_path)
    moment = watching.once(tmp_path, Rates())
    assert moment.run.status == "unknown" and not watching.over(moment)
    assert watching.over(moment._replace(silent=watching.PATIENCE))
    old = time.time() - 3600
    os.utime(tmp_path / LOG, (old, old))
    assert len(list(watching.watch(tmp_path, rates=Rates()))) == 1


def test_a_log_too_long_for_one_look_is_shown_by_its_end_and_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tail, "BLOCK", 50_000)
    started(tmp_path, pid=os.getpid())
    add(tmp_path, *(window(i, evaluation=1.0, phases={"data": 0.5}) for i in range(3000)))
    watched = watching.Watching(tmp_path, Rates())
    first = watched.look(0.0)
    assert 0 < first.share < 1 and first.run.steps == 3000 and not watched.complete
    assert not watching.over(first._replace(run=first.run, silent=1e9))
    looks = 1
    while not watched.complete:
        moment, looks = watched.look(0.0), looks + 1
        assert looks < 20
    assert moment.share == 1.0 and sum(item.evaluation for item in moment.run.windows) == 3000.0


def test_the_run_to_watch(tmp_path):
    runs = tmp_path / "runs"
    for name in ("20260101-1", "20260102-1/rank1", "20260102-1/rank0"):
        started(runs / name)
    assert watching.find(None, runs) == runs / "20260102-1" / "rank0"
    assert watching.find(runs / "20260101-1") == runs / "20260101-1"
    assert watching.find(runs / "20260101-1" / LOG) == runs / "20260101-1"
    assert watching.find(runs / "20260102-1") == runs / "20260102-1" / "rank0"
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RecordError) as error:
            watching.find(wrong)
        assert error.value.remedy
    with pytest.raises(RecordError, match="no run"):
        watching.find(None, tmp_path / "nowhere")
