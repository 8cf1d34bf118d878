"""Trackers follow the record: nothing twice, nothing lost, nothing of a torn line; and they fail alone."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
import recorded_runs as recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.errors import MissingExtraError, UsageError
from upshift.records.tail import MAX_LINE
from upshift.sinks import following, trackers
from upshift.sinks.following import Follow
from upshift.sinks.tail import Tail

# -- the tail ----------------------------------------------------------------------------------------------------------


def lines(n, start=0):
    return b"".join(json.dumps({"kind": "x", "n": index}).encode() + b"\n" for index in range(start, start + n))


def numbers(items):
    return [item["n"] for item in items]


def drained(tail):
    found = tail.read()
    while tail.more:
        found += tail.read()
    return found


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 50))
def test_every_line_comes_once_however_the_file_grows(tmp_path_factory, cuts, most):
    file = tmp_path_factory.mktemp("tail") / "log.jsonl"
    data, tail, found, done = lines(12), Tail(file, most=most), [], 0
    for cut in [*cuts, len(data)]:
        with open(file, "ab") as opened:
            opened.write(data[done : done + cut])
        done = min(done + cut, len(data))
        found += drained(tail)
    assert numbers(found) == list(range(12))
    assert tail.torn == 0


def test_a_torn_last_line_waits(tmp_path):
    file = tmp_path / "log.jsonl"
    tail = Tail(file)
    assert tail.read() == []
    file.write_bytes(lines(2)[:-4])
    assert numbers(tail.read()) == [0]
    file.write_bytes(lines(2))
    assert numbers(tail.read()) == [1]


def test_what_is_no_line_of_ours_is_counted(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"kind": 3}\n[1]\n\xff\xfe\n{"n": 1}\n' + b"[" * 5000 + b"\n\n" + lines(1))
    tail = Tail(file)
    assert numbers(tail.read()) == [0]
    assert tail.torn == 5


@pytest.mark.parametrize("how", ["cut", "replaced", "cut and grown beyond"])
def test_a_file_that_begins_anew_is_read_anew(tmp_path, how):
    file = tmp_path / "log.jsonl"
    file.write_bytes(lines(5))
    tail = Tail(file)
    assert len(tail.read()) == 5
    if how == "replaced":
        (tmp_path / "new").write_bytes(lines(9, 100))
        (tmp_path / "new").replace(file)
    else:
        file.write_bytes(lines(2 if how == "cut" else 9, 100))
    assert numbers(tail.read())[:2] == [100, 101]


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert Tail(tmp_path / "pipe").read() == Tail(tmp_path / "folder").read() == []


def test_a_line_without_end_takes_bounded_memory(tmp_path):
    file = tmp_path / "log.jsonl"
    with open(file, "wb") as opened:
        opened.write(lines(1))
        opened.truncate(40 * MAX_LINE)
        opened.seek(40 * MAX_LINE)
        opened.write(b"\n" + lines(1, 1))
    tail = Tail(file)
    tracemalloc.start()
    found = drained(tail)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers(found) == [0, 1] and tail.torn == 1
    assert peak < 8 * MAX_LINE


def test_a_long_log_is_taken_in_pieces(tmp_path):
    """A million steps, each a line, as a resumed follower finds them."""
    line = b'{"kind":"steps","first":%d,"n":1,"at":1.0,"seconds":0.001,"loss":1.0}\n'
    with open(tmp_path / "log.jsonl", "wb") as file:
        for first in range(0, 1_000_000, 1000):
            file.write(b"".join(line % index for index in range(first, first + 1000)))
    tail = Tail(tmp_path / "log.jsonl")
    pieces, seen = 0, 0
    for _ in range(3):
        found = tail.read()
        assert 0 < len(found) <= MAX_LINE // len(line % 1)
        pieces, seen = pieces + 1, seen + len(found)
    assert tail.more and seen < 100_000


# -- following ---------------------------------------------------------------------------------------------------------


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, fail=None):
        self.points, self.notes, self.head, self.closing, self.calls = [], [], None, None, 0
        self.fail = fail

    def begin(self, began, folder):
        assert self.head is None
        self.head = began

    def add(self, points, notes):
        self.calls += 1
        if self.fail:
            raise self.fail
        self.points += points
        self.notes += notes

    def end(self, closing):
        assert self.closing is None
        self.closing = closing

    def series(self, name):
        return [(point.step, point.values[name]) for point in self.points if name in point.values]


EXPECTED_LOSS = [(10 * (index + 1), loss) for index, loss in enumerate(recorded.losses())]
EXPECTED_ACCURACY = [(30, 0.5 + 2 / 16), (60, 0.5 + 5 / 16)]


def test_a_run_is_handed_over_whole(tmp_path):
    kept = Kept()
    sink = Follow("kept", kept, recorded.write(tmp_path / "run"))
    sink.poll()
    sink.close()
    assert kept.series("train/loss") == EXPECTED_LOSS
    assert kept.series("train/steps_per_second") == [(step, 20.0) for step, _ in EXPECTED_LOSS]
    assert kept.series("phase/forward") == [(step, 0.02) for step, _ in EXPECTED_LOSS]
    assert kept.series("metric/accuracy") == EXPECTED_ACCURACY
    assert kept.series("metric/broken") == [], "unknown is no number"
    assert [value for _, value in kept.series("resource/cpu_cores_busy")] == [1.5, 1.5]
    assert [value for _, value in kept.series("resource/cpu_utilisation")] == [0.75, 0.75]
    assert [point.wall for point in kept.points][:2] == [recorded.CLOCK + 0.5, recorded.CLOCK + 1.0]
    assert [(note.kind, note.text) for note in kept.notes] == [
        ("no effect", "bf16: nothing to do"), ("alarm memory", "out of memory soon"),
    ]  # fmt: skip
    assert kept.head.techniques == {"bf16": {"dtype": "bfloat16"}}
    assert kept.head.arguments == ("--lr", "0.1", "--api-key", "***")
    assert kept.closing.ended.code == 0 and kept.closing.step == 60
    assert kept.closing.wall == recorded.CLOCK + 3.25
    assert kept.closing.report.read_text().startswith("<!")
    sink.poll()
    sink.close()
    assert len(kept.points) == 6 + 2 + 3, "nothing comes twice"


def test_it_follows_a_run_that_grows_and_is_killed(tmp_path):
    kept = Kept()
    sink = Follow("kept", kept, tmp_path / "run")
    sink.poll()
    assert kept.head is None
    log = recorded.begin(tmp_path / "run")
    for index in range(3):
        recorded.window(log, index)
        sink.poll()
        assert kept.series("train/loss") == EXPECTED_LOSS[: index + 1]
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(b'{"kind":"steps","first":30,')
    sink.close()
    assert kept.series("train/loss") == EXPECTED_LOSS[:3]
    assert kept.closing.ended is None


def test_a_second_start_in_the_same_log_goes_on_with_its_own_clock(tmp_path):
    recorded.write(tmp_path / "run", code=1)
    log = recorded.begin(tmp_path / "run", clock=recorded.CLOCK + 1000)
    recorded.window(log, 5)
    kept = Kept()
    Follow("kept", kept, tmp_path / "run").close()
    assert kept.series("train/loss")[-1] == EXPECTED_LOSS[5]
    losses = [point for point in kept.points if "train/loss" in point.values]
    assert losses[-1].wall == recorded.CLOCK + 1003.0
    assert "start" in [note.kind for note in kept.notes]
    assert kept.closing.ended is None, "the end was that of the first"


def test_of_a_launch_the_first_rank_is_followed(tmp_path):
    kept = Kept()
    sink = Follow("kept", kept, tmp_path / "launch")
    recorded.write(tmp_path / "launch" / "rank1")
    sink.poll()
    log = recorded.begin(tmp_path / "launch" / "rank0", script="first.py")
    recorded.window(log, 0)
    sink.poll()
    sink.poll()
    assert kept.head.script == "first.py"
    assert kept.series("train/loss") == EXPECTED_LOSS[:1]


def test_a_tracker_that_raises_does_so_once_and_is_left_alone(tmp_path):
    kept = Kept(fail=OSError(28, "No space left on device"))
    sink = Follow("kept", kept, recorded.write(tmp_path / "run"))
    with pytest.raises(OSError, match="No space"):
        sink.poll()
    sink.poll()
    sink.close()
    assert kept.calls == 1 and kept.closing is None


def test_closing_gives_up_on_a_slow_tracker(tmp_path, monkeypatch):
    log = recorded.begin(tmp_path / "run")
    for index in range(20_000):
        log.append("steps", first=index, n=1, at=float(index), seconds=1.0, loss=1.0)
    kept = Kept()
    now = [0.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])
    kept.add = lambda points, notes: now.__setitem__(0, now[0] + following.LAST_LOOK + 1)
    Follow("kept", kept, tmp_path / "run").close()
    assert kept.closing.step < 20_000, "the rest was left out"


@settings(max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["start", "steps", "metrics", "end", "techniques", "guard"])},
            optional={
                name: st.one_of(st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
                for name in ("first", "n", "at", "seconds", "step", "code", "text", "clock", "loss", "started")
            },
        ),
        max_size=8,
    )
)
def test_no_log_whatever_it_holds_raises(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    recorded.begin(folder)
    with open(folder / "log.jsonl", "a") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    kept = Kept()
    Follow("kept", kept, folder).close()
    assert kept.closing is not None
    assert all(0 <= point.step < 2**63 and 0 <= point.wall < 1e10 for point in kept.points)


@pytest.mark.parametrize(
    ("given_", "left"),
    [
        (["--token=abc", "--lr", "1"], ["--token=***", "--lr", "1"]),
        (["--password", "abc", "abc"], ["--password", "***", "abc"]),
        (["--use-auth", "--lr"], ["--use-auth", "--lr"]),
        (["--lr=1", "data"], ["--lr=1", "data"]),
    ],
)
def test_secrets_are_left_out(given_, left):
    assert following.without_secrets(given_) == left


def test_checkpoints_are_named_in_order(tmp_path):
    for name in ("step-9-a1", "step-100-a1", "step-20-a2", ".tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-500-a1").mkdir()
    assert [path.name for path in following.checkpoints(tmp_path)] == ["step-9-a1", "step-20-a2", "step-100-a1"]


# -- what the command line says before training starts -----------------------------------------------------------------


def test_a_missing_package_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(trackers, "installed", lambda package: package != "wandb")
    with pytest.raises(MissingExtraError, match="wandb") as caught:
        trackers.check(["wandb:mine"])
    assert caught.value.remedy == "pip install 'upshift[wandb]'"


def test_mlflow_on_a_database_needs_what_speaks_to_databases(monkeypatch):
    monkeypatch.setattr(trackers, "installed", lambda package: package == "mlflow")
    assert trackers.check(["mlflow:http://host:5000"]) == ["mlflow:http://host:5000"]
    with pytest.raises(MissingExtraError, match="sqlalchemy"):
        trackers.check(["mlflow:sqlite:///runs.db"])


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers.installed("no_such_tracker")
    assert trackers.installed("msgspec")


def test_places_are_whole_and_each_comes_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(trackers, "installed", lambda package: True)
    told = trackers.check(
        ["tensorboard:tb", "prometheus:run.prom", "mlflow", "mlflow:sqlite:///mlflow.db", "wandb:p", "tensorboard:tb"]
    )
    assert told == [
        f"tensorboard:{tmp_path}/tb", f"prometheus:{tmp_path}/run.prom", f"mlflow:sqlite:///{tmp_path}/mlflow.db",
        "wandb:p",
    ]  # fmt: skip
    assert trackers.check(["mlflow:new"]) == [f"mlflow:sqlite:///{tmp_path}/new/mlflow.db"]
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    assert trackers.check(["mlflow"]) == [f"mlflow:sqlite:///{tmp_path}/mlflow.db"], "only artefacts"
    (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    assert trackers.check(["mlflow"]) == [f"mlflow:file://{tmp_path}/mlruns"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert trackers.check(["mlflow"]) == ["mlflow:http://there"]
    assert not list((tmp_path).glob("tb*")), "nothing is written"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("tensorbord", "Did you mean tensorboard"),
        ("", "Trackers are"),
        ("comet:x", "Trackers are"),
        ("prometheus:run.txt", ".prom"),
        ("prometheus:.", "a folder"),
        ("tensorboard:taken/tb", "cannot write"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, monkeypatch, spec, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    monkeypatch.setattr(trackers, "installed", lambda package: True)
    with pytest.raises(UsageError, match=text):
        trackers.check([spec])


def test_opening_sinks_imports_no_tracker(tmp_path):
    sinks = trackers.open_sinks(["tensorboard", "wandb", "mlflow:http://x", "prometheus"], tmp_path)
    assert [sink.name for sink in sinks] == ["tensorboard", "wandb", "mlflow", "prometheus"]
    for sink in sinks:
        sink.poll()
    assert not {"wandb", "mlflow"} & set(sys.modules) or "test_foreign_runs" in sys.modules
    assert list(tmp_path.iterdir()) == []


# -- the trackers themselves, read back by their own readers -----------------------------------------------------------


def followed(spec: str, folder: Path) -> None:
    (sink,) = trackers.open_sinks([spec], recorded.write(folder))
    sink.poll()
    sink.close()


def test_tensorboard_reads_what_is_written(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # a run that is resumed writes its file anew
        followed(f"tensorboard:{tmp_path / 'tb'}", tmp_path / "run")
    found = accumulators.EventAccumulator(str(tmp_path / "tb" / "run")).Reload()
    scalars = {tag: [(item.step, item.value) for item in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars["train/loss"][:6] == EXPECTED_LOSS
    assert scalars["metric/accuracy"][:2] == EXPECTED_ACCURACY
    assert [item.wall_time for item in found.Scalars("train/loss")][:2] == [recorded.CLOCK + 0.5, recorded.CLOCK + 1.0]
    assert {"upshift/run", "upshift/events", "upshift/end"} <= set(found.Tags()["tensors"])
    (about,) = [item.tensor_proto.string_val[0].decode() for item in found.Tensors("upshift/run")]
    assert "technique/bf16" in about and "hunter2" not in about
    assert len(list((tmp_path / "tb" / "run").iterdir())) == 1


def test_a_full_disk_ends_the_tracker_only(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from upshift.sinks.tensorboard import TensorBoard

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    board = TensorBoard(tmp_path / "tb")
    log = recorded.begin(tmp_path / "run")
    sink = Follow("tensorboard", board, tmp_path / "run")
    sink.poll()
    board._file = Full()
    recorded.window(log, 0)
    with pytest.raises(OSError):
        sink.poll()
    sink.close()


@pytest.fixture
def no_server(monkeypatch, tmp_path):
    """No key, no network, whatever this machine has."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize(
    ("environment", "kept", "expected"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
        ({}, "machine api.wandb.ai login user password key", "online"),
        ({"WANDB_BASE_URL": "https://own.example"}, "machine api.wandb.ai login user password key", "offline"),
        ({}, "machine api.wandb.ai login", "offline"),
        ({}, "no netrc at all {", "offline"),
    ],
)
def test_wandb_is_offline_unless_there_is_a_key(no_server, monkeypatch, tmp_path, environment, kept, expected):
    from upshift.sinks import weights_biases

    (tmp_path / "netrc").write_text(kept)
    (tmp_path / "netrc").chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert weights_biases.mode() == expected


class Server:
    """What `MlflowClient` is asked for; counts what a call carries, as a server would."""

    def __init__(self):
        self.numbers, self.tags, self.ended = [], {}, None

    def log_batch(self, run, metrics=(), params=(), tags=()):
        assert len(metrics) <= 1000 and len(params) <= 100 and len(tags) <= 100
        self.numbers += metrics
        self.tags.update(tags)

    def set_tag(self, run, name, value):
        self.tags[name] = value

    def set_terminated(self, run, status, end_time):
        self.ended = status


def test_mlflow_gets_batches_that_it_takes(tmp_path):
    from types import SimpleNamespace

    from upshift.sinks.following import Closing, Note, Point
    from upshift.sinks.mlflow_store import MlflowStore

    store, server = MlflowStore("http://there"), Server()
    store._client = server
    store._entities = SimpleNamespace(Metric=lambda *parts: parts, RunTag=lambda *parts: parts)
    points = [Point(step, 10.0, {"a": 1.0, "b@c": float(step)}) for step in range(1200)]
    for _ in range(2):
        store.add(points, [Note(1, 10.0, "guard", "x" * 5000)] * 70)
    assert len(server.numbers) == 4800 and server.numbers[1] == ("b_c", 0.0, 10_000, 0)
    assert len(server.tags) == 90 and max(map(len, server.tags.values())) == 500
    store.end(Closing(None, 1, 10.0, None, (tmp_path / "step-1-a1",)))
    assert server.ended == "KILLED" and server.tags["upshift.checkpoints"].endswith("step-1-a1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loss", "train/loss"),
        ("acc@1 (%)", "acc_1 ___"),
        ("../../etc", "_/_/etc"),
        ("/a", "_/a"),
        ("é" * 300, "?".replace("?", "_") * 250),
    ],
)
def test_names_as_mlflow_takes_them(name, expected):
    from upshift.sinks.mlflow_store import key

    assert key(name) == expected
