"""Saving, finding, keeping and locking: what is in the folder, and what is said about it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from rank_threads import Threads
from safetensors.torch import load_file

from upshift.checkpoint import Store
from upshift.checkpoint.retention import Checkpoint, to_delete
from upshift.errors import CheckpointError, InUseError
from upshift.testing.crashes import forked, same, state


def steps(store):
    return [item.step for item in store.checkpoints()]


def test_what_is_saved_is_loaded(tmp_path):
    facts = {"samples": 512, "loss": float("nan"), "shape": (1, 2), "job": {"name": "cifar"}}
    with Store(tmp_path) as store:
        saved = store.save(7, state(7), facts=facts)
        assert saved.path == tmp_path / "checkpoints" / "step-7-a1" and saved.seconds > 0
        newest = store.newest()
        assert (newest.step, newest.attempt, newest.verified, newest.bytes) == (7, 1, True, saved.bytes)
        tree, told = store.load(newest)
    assert same(tree, state(7))
    assert told == {"samples": 512, "loss": "nan", "shape": [1, 2], "job": {"name": "cifar"}}


def test_the_files_are_safetensors_and_json_for_everybody(tmp_path):
    with Store(tmp_path) as store:
        folder = store.save(7, {**state(7), "z": torch.ones(2, dtype=torch.complex128)}).path
    assert sorted(os.listdir(folder)) == ["manifest.json", "rank-0-of-1.safetensors", "state.json"]
    weights = load_file(folder / "rank-0-of-1.safetensors")
    assert torch.equal(weights["model.weight"], state(7)["model"]["weight"]) and weights["z"].shape == (2, 16)
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    assert manifest["step"] == 7 and manifest["versions"]["torch"] == torch.__version__
    assert json.loads((folder / "state.json").read_text())["schema"] == 1


def test_folders_and_files_are_the_owners_alone(tmp_path):
    with Store(tmp_path / "run") as store:
        store.save(1, state(1))
    for path in (tmp_path / "run").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint64", "complex64", "float16", "bool"])
def test_every_dtype_comes_back(tmp_path, dtype):
    value = torch.tensor([0, 1, 2]).to(getattr(torch, dtype))
    with Store(tmp_path) as store:
        store.save(1, {"x": value, "empty": value[:0], "scalar": value[1]})
        tree, _ = store.load(store.newest())
    assert tree["x"].dtype == value.dtype and tree["empty"].shape == (0,) and tree["scalar"].shape == ()
    assert torch.equal(tree["x"].view(torch.uint8), value.view(torch.uint8))


# -- retention --------------------------------------------------------------------------------------------------------


def test_the_newest_two_the_best_and_the_last_before_a_spike_stay(tmp_path):
    with Store(tmp_path) as store:
        for step in range(1, 11):
            store.save(step, state(step), best=step in (2, 4), before_spike=step in (3, 6))
        assert steps(store) == [4, 6, 9, 10]
        assert sorted(os.listdir(store.folder)) == [
            "attempt.json", "lock", "step-10-a1", "step-4-a1", "step-6-a1", "step-9-a1",
        ]  # fmt: skip


def test_nothing_is_deleted_before_two_are_verified():
    items = [Checkpoint(Path(str(step)), step, 1) for step in range(1, 6)]

    def gone(bad):
        return [item.step for item in to_delete(items, lambda item: item.step not in bad)]

    assert gone(()) == [1, 2, 3]
    assert gone((5,)) == [1, 2]
    assert gone((5, 4, 2)) == []
    assert gone((1, 2, 3, 4)) == [] == gone((1, 2, 3, 4, 5))


def test_a_damaged_one_does_not_count_among_the_newest_two(tmp_path):
    said = []
    with Store(tmp_path, say=said.append) as store:
        store.save(1, state(1))
        store.save(2, state(2))
    (tmp_path / "checkpoints/step-2-a1/state.json").write_text("{}")
    with Store(tmp_path, say=said.append) as store:
        store.save(3, state(3))
        assert steps(store) == [1, 3]
    assert said == ["step-2-a1 moved to quarantine: state.json has 2 bytes instead of "
                    + said[0].rpartition(" ")[2]]  # fmt: skip


# -- order, names, clocks ---------------------------------------------------------------------------------------------


def test_order_is_by_step_whatever_the_clocks_say(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        store.save(9, state(9))
        monkeypatch.setattr(time, "time", lambda: 1.0)
        monkeypatch.setattr(time, "strftime", lambda *a: "1970-01-01 00:00:01")
        saved = store.save(10, state(10))
        assert saved.seconds >= 0
        os.utime(saved.path, (1, 1))
        for name in os.listdir(saved.path):
            os.utime(saved.path / name, (1, 1))
        os.utime(tmp_path / "checkpoints" / "step-9-a1", (2**33, 2**33))
        assert store.newest().step == 10
        store.save(11, state(11))
        assert steps(store) == [10, 11]


def test_a_name_is_never_used_twice(tmp_path):
    with Store(tmp_path) as store:
        for _ in range(3):
            store.save(5, state(5))
        assert [item.path.name for item in store.checkpoints()] == ["step-5-a1-2", "step-5-a1-3"]
    with Store(tmp_path) as store:
        assert store.attempt == 2
        assert store.save(5, state(5)).path.name == "step-5-a2"
        assert store.newest().path.name == "step-5-a2"


def test_attempts_go_on_when_their_file_is_lost(tmp_path):
    for expected in (1, 2, 3):
        with Store(tmp_path) as store:
            assert store.attempt == expected
            store.save(expected, state(expected))
        (tmp_path / "checkpoints" / "attempt.json").write_bytes(b"{" if expected == 1 else b"")


def test_going_back_sets_later_ones_aside(tmp_path):
    with Store(tmp_path) as store:
        for step in (1, 2, 3):
            store.save(step, state(step), before_spike=step == 1)
        store.go_back(1)
        assert steps(store) == [1]
        store.save(2, state(20))
        assert store.newest().path.name == "step-2-a1-2"
        assert sorted(os.listdir(store.folder / "quarantine")) == ["step-2-a1", "step-3-a1"]


# -- ownership --------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_at_once_by_name(tmp_path):
    with Store(tmp_path):
        begun = time.monotonic()
        with pytest.raises(InUseError, match=f"in use by process {os.getpid()} ") as caught:
            Store(tmp_path).acquire()
        assert time.monotonic() - begun < 1.0 and caught.value.exit_code == 10
    with Store(tmp_path) as store:
        assert store.attempt == 2


def test_without_owning_nothing_is_written_or_moved(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, state(1))
        store.save(2, state(2))
    (tmp_path / "checkpoints/step-2-a1/state.json").write_text("{}")
    said = []
    other = Store(tmp_path, say=said.append)
    assert other.newest().step == 1 and "damaged" in said[0]
    assert steps(other) == [1, 2]
    with pytest.raises(InUseError):
        other.save(3, state(3))
    assert steps(other) == [1, 2] and not list(other.folder.glob(".tmp-*"))


def test_an_owner_that_was_taken_over_stops(tmp_path):
    """As on a filesystem whose locks do not lock."""
    with Store(tmp_path) as store:
        store.save(1, state(1))
        (store.folder / "attempt.json").write_bytes(msgspec.json.encode({"attempt": 2, "pid": 1, "host": "other"}))
        with pytest.raises(InUseError, match="other"):
            store.save(2, state(2))
        assert steps(store) == [1] and not list(store.folder.glob(".tmp-*"))


def test_a_worker_that_outlives_its_trainer_does_not_keep_the_folder(tmp_path):
    told, tell = os.pipe()

    def trainer():
        Store(tmp_path).acquire()
        trainer = os.getpid()

        def worker():
            os.write(tell, os.getpid().to_bytes(4, "big"))
            os.kill(trainer, 9)
            time.sleep(30)

        forked(worker)
        time.sleep(30)

    os.waitpid(forked(trainer), 0)
    worker = int.from_bytes(os.read(told, 4), "big")
    try:
        with Store(tmp_path) as store:
            assert store.attempt == 2
    finally:
        os.kill(worker, 9)


def test_leftovers_go_at_the_next_start(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, state(1))
    for name in (".tmp-step-2-a1-2", ".trash-step-0-a1"):
        (tmp_path / "checkpoints" / name / "inner").mkdir(parents=True)
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    (tmp_path / "checkpoints" / ".trash-link").symlink_to(outside)
    (tmp_path / "checkpoints" / ".tmp-step-2-a1-2" / "link").symlink_to(outside)
    with Store(tmp_path) as store:
        assert sorted(os.listdir(store.folder)) == ["attempt.json", "lock", "step-1-a1"]
    assert (outside / "file").read_text() == "x"


# -- several ranks ----------------------------------------------------------------------------------------------------


def test_two_ranks_write_one_checkpoint_and_each_gets_its_own(tmp_path):
    ranks = Threads(tmp_path)

    def act(rank, store):
        store.acquire()
        saved = store.save(3, {"rank": rank, "x": torch.full((4,), rank)}, facts={"by": rank})
        return saved, store.newest(), store.load(store.newest())

    for rank, (saved, newest, (tree, facts)) in enumerate(ranks.run(act)):
        assert saved.path == newest.path and newest.world == 2 and facts == {"by": 0}
        assert same(tree, {"rank": rank, "x": torch.full((4,), rank)})
    names = sorted(os.listdir(tmp_path / "checkpoints/step-3-a1"))
    assert names == ["manifest.json", "rank-0-of-2.safetensors", "rank-1-of-2.safetensors", "state.json"]
    alone = Store(tmp_path)
    assert alone.load(alone.newest())[0]["rank"] == 0 and alone.load(alone.newest(), rank=1)[0]["rank"] == 1
    assert alone.load(alone.newest(), rank=7)[0]["rank"] == 0


def test_a_failure_on_one_rank_is_one_on_all(tmp_path):
    ranks = Threads(tmp_path)

    def act(rank, store):
        store.acquire()
        store.save(1, {"x": torch.zeros(1)})
        return store.save(2, {"x": torch.zeros(1) if rank == 0 else object()})

    first, second = ranks.run(act)
    assert isinstance(first, CheckpointError) and isinstance(second, CheckpointError)
    assert "rank 1: a value of type object" in first.message
    assert steps(Store(tmp_path)) == [1] and not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_folder_in_use_is_refused_on_all_ranks(tmp_path):
    ranks = Threads(tmp_path)
    with Store(tmp_path):
        assert all(isinstance(found, InUseError) for found in ranks.run(lambda rank, store: store.acquire()))


# -- without torch ----------------------------------------------------------------------------------------------------


def test_looking_and_verifying_needs_no_torch(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, state(1))
    code = (
        "import sys; from pathlib import Path; from upshift import checkpoint\n"
        f"found = checkpoint.Store(Path({str(tmp_path)!r})).checkpoints(verify=True)\n"
        "assert found[0].verified and not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
