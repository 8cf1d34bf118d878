"""Runs recorded elsewhere: what was logged is what is read; what is damaged is said."""

from __future__ import annotations

import math
import sqlite3
import struct
import zlib
from pathlib import Path

import pytest
import recorded_runs as recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upshift.errors import MissingExtraError, RecordError
from upshift.records.runfold import MOST_EVENTS, MOST_WINDOWS, fold
from upshift.sinks import foreign, trackers
from upshift.sinks.foreign.series import MOST_POINTS, Found, Series, loss_name, to_run

BEGAN = 1_790_000_000.0


def found(series, **more):
    """`series`: name -> [(step, seconds since the beginning, value)]."""
    made = Found(source="a test", id="x", script="x", began=BEGAN, **more)
    for name, points in series.items():
        for step, at, value in points:
            made.add(name, step, BEGAN + at, value)
    return made


def metrics(run):
    """(step, name) -> value."""
    return {(e.step, name): value for e in run.events if e.kind == "metrics" for name, value in e.values.items()}


# -- from series to a run ----------------------------------------------------------------------------------------------


def test_windows_lie_between_logged_losses():
    run = to_run(found({"train/loss": [(10, 2.0, 3.0), (20, 3.0, 2.0), (40, 7.0, 1.0)], "val/acc": [(40, 7.5, 0.5)]}))
    assert [(w.first, w.n, w.at, w.seconds, w.loss) for w in run.windows] == [
        (0, 10, 2.0, 2.0, 3.0), (10, 10, 3.0, 1.0, 2.0), (20, 20, 7.0, 4.0, 1.0),
    ]  # fmt: skip
    assert (run.steps, run.seconds, run.status, run.exit_code) == (40, 7.5, "unknown", None)
    assert metrics(run) == {(40, "val/acc"): 0.5}
    assert "'train/loss'" in run.events[0].text and "a test" in run.events[0].text


def test_steps_counted_from_zero():
    run = to_run(found({"loss": [(0, 1.0, 3.0), (1, 2.0, 2.0)]}))
    assert [(w.first, w.n) for w in run.windows] == [(0, 1), (1, 1)]
    assert run.steps == 2


def test_a_training_that_went_back():
    run = to_run(found({"loss": [(10, 1.0, 3.0), (20, 2.0, 2.0), (10, 3.0, 2.5), (20, 4.0, 1.5)]}))
    assert [(w.first, w.n, w.loss) for w in run.windows] == [(0, 10, 3.0), (10, 10, 2.0), (0, 10, 2.5), (10, 10, 1.5)]
    assert all(w.seconds > 0 for w in run.windows)


def test_without_a_known_start_the_first_loss_is_the_start():
    made = found({"loss": [(10, 5.0, 3.0), (20, 6.0, 2.0)]})
    made.began = None
    run = to_run(made)
    assert [(w.first, w.n, w.at, w.seconds) for w in run.windows] == [(10, 10, 1.0, 1.0)]


def test_nothing_logged_and_nothing_of_a_loss():
    assert to_run(found({})).windows == ()
    run = to_run(found({"val/loss": [(5, 1.0, 0.5)], "acc": [(7, 1.0, math.nan)]}))
    assert run.windows == () and run.steps == 7
    assert metrics(run) == {(5, "val/loss"): 0.5, (7, "acc"): None}


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["val/loss", "loss", "train/loss"], "train/loss"),
        (["eval_loss", "loss"], "loss"),
        (["train_loss_epoch", "val_loss"], "train_loss_epoch"),
        (["test loss", "accuracy"], ""),
        (["Train/Loss", "lr"], "Train/Loss"),
    ],
)
def test_which_series_is_the_training_loss(names, meant):
    series = {name: Series() for name in names}
    for item in series.values():
        item.add(1, BEGAN, 1.0)
    assert loss_name(series) == meant


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["loss", "acc", "train/steps_per_second", "lr"]),
            st.integers(-5, 2**70) | st.integers(0, 50),
            st.floats(-10, 1e12) | st.floats(0, 100),
            st.floats(),
        ),
        max_size=30,
    )
)
def test_any_series_give_a_run_that_holds(points):
    made = Found(source="a test", id="x", script="x", began=BEGAN)
    for name, step, at, value in points:
        made.add(name, step, BEGAN + at, value)
    run = to_run(made)
    for window in run.windows:
        assert window.n >= 1 and 0 <= window.seconds < math.inf and window.first >= 0
        assert window.loss is None or math.isfinite(window.loss)
    assert run.torn_lines + sum(len(item) for item in made.series.values()) == len(points)


def test_a_million_points_are_thinned_and_their_sums_stay():
    made = Found(source="a test", id="x", script="x", began=BEGAN)
    for step in range(1, 300_001):
        made.add("loss", step, BEGAN + step / 100, 1.0)
        made.add("lr", step, BEGAN + step / 100, 0.1)
    assert len(made.series["lr"]) <= 2 * MOST_POINTS
    run = to_run(made)
    assert len(run.windows) <= MOST_WINDOWS and len(run.events) <= MOST_EVENTS + 1
    assert sum(w.n for w in run.windows) == 300_000 == run.steps
    assert sum(w.seconds for w in run.windows) == pytest.approx(3000)


# -- what a path is ----------------------------------------------------------------------------------------------------


def test_detect_tells_them_apart(tmp_path):
    recorded.write(tmp_path / "runs" / "own")
    (tmp_path / "runs" / "own" / "tensorboard").mkdir()
    (tmp_path / "runs" / "own" / "tensorboard" / "events.out.tfevents.1.host").touch()
    board = tmp_path / "tb" / "version_0"
    board.mkdir(parents=True)
    (board / "events.out.tfevents.1.host").touch()
    offline = tmp_path / "wandb" / "offline-run-1-abc"
    offline.mkdir(parents=True)
    (offline / "run-abc.wandb").touch()
    store = tmp_path / "mlruns" / "0" / "abc"
    store.mkdir(parents=True)
    (store / "meta.yaml").write_text("run_id: abc\n")
    sqlite3.connect(tmp_path / "m.db").execute("create table x(y)").connection.close()
    expected = {
        "runs": "", "runs/own": "", "nothing": "", "tb": "tensorboard", "tb/version_0": "tensorboard",
        "tb/version_0/events.out.tfevents.1.host": "tensorboard", "wandb/offline-run-1-abc": "wandb",
        "wandb/offline-run-1-abc/run-abc.wandb": "wandb", "mlruns": "mlflow", "mlruns/0": "mlflow",
        "mlruns/0/abc": "mlflow", "m.db": "mlflow", "m.db#abc": "mlflow", "runs/own/log.jsonl": "",
    }  # fmt: skip
    assert {path: foreign.detect(tmp_path / path) for path in expected} == expected
    assert foreign.detect(f"sqlite:///{tmp_path}/m.db#abc") == "mlflow"


@pytest.mark.parametrize("name", ["nothing", "runs"])
def test_what_is_no_run_is_said(tmp_path, name):
    recorded.write(tmp_path / "runs" / "own")
    with pytest.raises(RecordError):
        foreign.read(tmp_path / name)


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def crc(data):
    """CRC-32C, bit by bit, and masked as in the record format."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(*records):
    """A file of records, each with its length and sums."""
    return b"".join(
        (length := struct.pack("<Q", len(data))) + crc(length) + data + crc(data) for data in records
    )  # fmt: skip


def event(wall, step=0, **values):
    """One event; written with the protocol's own classes, but not by our writer."""
    protos = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    made = protos.Event(wall_time=wall, step=step)
    for name, value in values.items():
        item = made.summary.value.add(tag=name.replace("__", "/"))
        if isinstance(value, float):
            item.simple_value = value
        else:
            item.metadata.plugin_data.plugin_name = value[0]
            item.tensor.dtype = value[1]
            item.tensor.tensor_content = value[2]
    if not values:
        made.file_version = "brain.Event:2"
    return made.SerializeToString()


def board(folder: Path, *records: bytes, name="events.out.tfevents.1.host", cut=0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = framed(*records)
    (folder / name).write_bytes(data[: len(data) - cut])
    return folder


def test_scalars_of_both_kinds(tmp_path):
    double, half = struct.pack("<d", 0.1), struct.pack("<e", 0.5)
    board(
        tmp_path / "tb",
        event(BEGAN),
        event(BEGAN + 1, 10, train__loss=2.5, acc=("scalars", 2, double)),
        event(BEGAN + 2, 20, train__loss=1.5, acc=("scalars", 2, double), f1=("scalars", 19, half)),
        event(BEGAN + 2, 20, words=("text", 1, struct.pack("<f", 1.0)), huge=("scalars", 1, b"\0" * 64)),
    )
    run = foreign.read(tmp_path / "tb")
    assert [(w.first, w.n, w.seconds, w.loss) for w in run.windows] == [(0, 10, 1.0, 2.5), (10, 10, 1.0, 1.5)]
    assert metrics(run) == {(10, "acc"): 0.1, (20, "acc"): 0.1, (20, "f1"): 0.5}
    assert (run.id, run.status, run.seconds) == ("tb", "unknown", 2.0)


def test_parts_of_one_training_are_read_together(tmp_path):
    board(tmp_path / "tb" / "train", event(BEGAN), event(BEGAN + 1, 1, epoch_loss=2.5))
    board(tmp_path / "tb" / "validation", event(BEGAN), event(BEGAN + 2, 1, epoch_loss=3.5))
    run = foreign.read(tmp_path / "tb")
    assert [w.loss for w in run.windows] == [2.5]
    assert metrics(run) == {(1, "validation/epoch_loss"): 3.5}


def test_several_trainings_are_not_mixed(tmp_path):
    for name in ("first", "second"):
        board(tmp_path / "tb" / name, event(BEGAN), event(BEGAN + 1, 1, loss=2.5))
    with pytest.raises(RecordError, match="several trainings") as caught:
        foreign.read(tmp_path / "tb")
    assert "first, second" in caught.value.remedy
    assert foreign.read(tmp_path / "tb" / "second").steps == 1


@pytest.mark.parametrize("cut", [1, 4, 20])
def test_a_torn_event_file_is_read_up_to_the_tear(tmp_path, cut):
    folder = board(
        tmp_path / "tb", event(BEGAN), event(BEGAN + 1, 10, loss=2.5), event(BEGAN + 2, 20, loss=1.5), cut=cut
    )
    assert [w.loss for w in foreign.read(folder).windows] == [2.5]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_ends_in_a_traceback(tmp_path, data):
    records = [event(BEGAN), event(BEGAN + 1, 10, loss=2.5), event(BEGAN + 2, 20, loss=1.5)]
    whole = bytearray(framed(*records))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[place] ^= data.draw(st.integers(1, 255))
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(whole)
    try:
        run = foreign.read(file)
    except RecordError:
        return
    # The sums hide nothing: what is read is what was written.
    assert {w.loss for w in run.windows} <= {2.5, 1.5}


def test_a_record_that_is_no_event_is_counted(tmp_path):
    folder = board(tmp_path / "tb", event(BEGAN), b"\xff" * 9, event(BEGAN + 1, 10, loss=2.5))
    run = foreign.read(folder)
    assert run.torn_lines == 1 and [w.loss for w in run.windows] == [2.5]


def test_an_empty_event_file_is_said(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(RecordError, match="no event"):
        foreign.read(board(tmp_path / "tb"))


def test_without_the_package_the_command_is_told(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "events.out.tfevents.1.host").touch()
    with pytest.raises(MissingExtraError) as caught:
        foreign.read(tmp_path)
    assert "upshift[tensorboard]" in caught.value.remedy


# -- MLflow, read without it -------------------------------------------------------------------------------------------

TABLES = """
CREATE TABLE runs (run_uuid TEXT, name TEXT, lifecycle_stage TEXT, start_time INT, end_time INT, status TEXT,
                   source_name TEXT);
CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);
CREATE TABLE metrics (key TEXT, value REAL, timestamp INT, run_uuid TEXT, step INT, is_nan INT);
"""


def database(file, *runs, status="FINISHED"):
    with sqlite3.connect(file) as base:
        base.executescript(TABLES)
        for run in runs:
            began = int(1000 * BEGAN)
            base.execute(
                "INSERT INTO runs VALUES (?, ?, 'active', ?, ?, ?, 'a.py')",
                (run, f"name {run}", began, began + 9000, status),
            )
            base.execute("INSERT INTO tags VALUES ('mlflow.source.name', 'train.py', ?)", (run,))
            for step, value in ((10, 2.5), (20, 1.5)):
                base.execute(
                    "INSERT INTO metrics VALUES ('loss', ?, ?, ?, ?, 0)", (value, began + 100 * step, run, step)
                )
            base.execute("INSERT INTO metrics VALUES ('acc', 0, ?, ?, 20, 1)", (began + 2000, run))
    base.close()
    return file


def test_a_database(tmp_path):
    file = database(tmp_path / "m.db", "abc")
    before = file.read_bytes()
    run = foreign.read(file)
    assert [(w.first, w.n, w.seconds, w.loss) for w in run.windows] == [(0, 10, 1.0, 2.5), (10, 10, 1.0, 1.5)]
    assert metrics(run) == {(20, "acc"): None}
    assert (run.id, run.script, run.status, run.seconds) == ("name abc", "train.py", "finished", 9.0)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_of_several_runs_one_is_named(tmp_path):
    file = database(tmp_path / "m.db", "abc", "def")
    with pytest.raises(RecordError, match="2 runs") as caught:
        foreign.read(file)
    assert "abc (name abc)" in caught.value.remedy
    assert foreign.read(f"{file}#def").id == "name def"
    assert foreign.read(f"sqlite:///{file}#name abc").id == "name abc"
    with pytest.raises(RecordError, match="0 runs called ghi"):
        foreign.read(f"{file}#ghi")


@pytest.mark.parametrize(
    ("told", "status"),
    [("FAILED", "failed"), ("KILLED", "interrupted"), ("RUNNING", "unknown"), ("?", "unknown")],
)
def test_how_it_ended(tmp_path, told, status):
    assert foreign.read(database(tmp_path / "m.db", "abc", status=told)).status == status


def test_another_database_and_a_damaged_one_are_said(tmp_path):
    sqlite3.connect(tmp_path / "other.db").execute("create table x(y)").connection.close()
    whole = database(tmp_path / "m.db", "abc").read_bytes()
    (tmp_path / "m.db").write_bytes(whole[:100] + bytes(len(whole) - 100))
    for name in ("other.db", "m.db"):
        with pytest.raises(RecordError, match="cannot be read"):
            foreign.read(tmp_path / name)


def test_a_folder_store(tmp_path):
    folder = tmp_path / "mlruns" / "0" / "abc"
    (folder / "metrics" / "train").mkdir(parents=True)
    (folder / "tags").mkdir()
    began = int(1000 * BEGAN)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    (folder / "meta.yaml").write_text(
        f"run_id: abc\nrun_name: 'mine'\nstart_time: {began}\nend_time: null\nstatus: 4\n"
    )
    (folder / "tags" / "mlflow.source.name").write_text("train.py")
    (folder / "metrics" / "train" / "loss").write_text(
        f"{began + 1000} 2.5 10\n{began + 2000} nan 20\nbroken line x y\n"
    )
    (folder / "metrics" / "acc").write_text(f"{began + 2000} 0.75\n")
    for place in (tmp_path / "mlruns", folder, f"{tmp_path / 'mlruns'}#mine", (tmp_path / "mlruns").as_uri()):
        run = foreign.read(place)
        assert [(w.first, w.n, w.loss) for w in run.windows] == [(0, 10, 2.5), (10, 10, None)]
        assert metrics(run) == {(0, "acc"): 0.75}
        assert (run.id, run.script, run.status, run.torn_lines) == ("mine", "train.py", "failed", 1)


# -- there and back: what a sink of ours writes ------------------------------------------------------------------------


def same_training(run, folder: Path) -> None:
    """The imported run and the record it was written from tell the same."""
    own = fold(folder)
    assert [(w.first, w.n, w.loss) for w in run.windows] == [(w.first, w.n, w.loss) for w in own.windows]
    assert [w.seconds for w in run.windows] == pytest.approx([w.seconds for w in own.windows])
    assert [w.at for w in run.windows] == pytest.approx([w.at for w in own.windows], abs=2e-3)
    known = {key: value for key, value in metrics(own).items() if value is not None}
    assert metrics(run) == known and known
    assert run.steps == own.steps


def send(spec: str, folder: Path) -> None:
    (sink,) = trackers.open_sinks([spec], recorded.write(folder))
    sink.poll()
    sink.close()


def test_tensorboard_there_and_back(tmp_path):
    pytest.importorskip("tensorboard")
    send("tensorboard", tmp_path / "run")
    same_training(foreign.read(tmp_path / "run" / "tensorboard"), tmp_path / "run")


@pytest.mark.extra
def test_wandb_there_and_back(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-script")
    send("wandb:mine", tmp_path / "run")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run = foreign.read(folder)
    same_training(run, tmp_path / "run")
    assert (run.id, run.status, run.exit_code) == ("run", "finished", 0)
    (file,) = folder.glob("run-*.wandb")
    assert "of-the-script" not in file.name, "a run of its own"
    assert b"hunter2" not in file.read_bytes()
    assert not (folder / "files" / "requirements.txt").exists()
    # Killed: the file ends within a record.
    file.write_bytes(file.read_bytes()[:-30])
    cut = foreign.read(folder)
    assert cut.windows == run.windows and cut.torn_lines == 1 and cut.status == "unknown"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(RecordError, match="no record of W&B"):
        foreign.read(folder)


@pytest.mark.extra
def test_mlflow_there_and_back(tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow.tracking.client")
    pytest.importorskip("alembic")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    send(f"mlflow:sqlite:///{tmp_path}/store/m.db", tmp_path / "run")
    run = foreign.read(f"{tmp_path}/store/m.db#run")
    same_training(run, tmp_path / "run")
    assert (run.script, run.status, run.seconds) == ("train.py", "finished", 3.25)
    reader = client.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/store/m.db")
    (theirs,) = reader.search_runs([reader.get_experiment_by_name("upshift").experiment_id])
    history = [(item.step, item.value) for item in reader.get_metric_history(theirs.info.run_id, "train/loss")]
    assert history == [(10 * (index + 1), loss) for index, loss in enumerate(recorded.losses())]
    assert theirs.data.params["technique/bf16"] == '{"dtype": "bfloat16"}'
    assert [item.path for item in reader.list_artifacts(theirs.info.run_id)] == ["report.html"]
    assert "hunter2" not in str(theirs.data.params)


# -- W&B's file, read by us --------------------------------------------------------------------------------------------


def blocks(*records: bytes) -> bytes:
    """The format as its document tells it, written byte by byte into one string."""
    made = bytearray(b":W&B\xe1\xbe\x00")
    for data in records:
        first = True
        while True:
            room = 32768 - len(made) % 32768
            if room < 7:
                made += bytes(room)
                continue
            part, data = data[: room - 7], data[room - 7 :]
            kind = (1 if first else 4) if not data else (2 if first else 3)
            made += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
            if not data:
                break
    return bytes(made)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 100_000) | st.integers(32_740, 32_775), max_size=5))
def test_records_of_any_size_come_back(tmp_path, sizes):
    from upshift.sinks.foreign import block_log

    given_ = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    (tmp_path / "run-x.wandb").write_bytes(blocks(*given_))
    assert block_log.is_log(tmp_path / "run-x.wandb")
    assert list(block_log.records(tmp_path / "run-x.wandb")) == given_


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_records_are_told_and_no_others_made_up(tmp_path, data):
    from upshift.sinks.foreign import block_log

    given_ = [b"a" * 40_000, b"b" * 10, b"c" * 40_000, b"d" * 10]
    whole = bytearray(blocks(*given_))
    place = data.draw(st.integers(7, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "run-x.wandb").write_bytes(whole)
    found = list(block_log.records(tmp_path / "run-x.wandb"))
    assert None in found or found == given_, "only unused room may change unseen"
    assert {item for item in found if item} <= set(given_)


def test_what_was_sent_afterwards_keeps_the_times_of_the_training():
    made = found({"loss": [(10, 1.0, 3.0), (20, 2.0, 2.0)]})
    made.began, made.ended = BEGAN + 1000, BEGAN + 1001
    run = to_run(made)
    assert run.seconds == 1.0 and [(w.first, w.at, w.seconds) for w in run.windows] == [(10, 1.0, 1.0)]
