"""A disk that is full, broken, slow to take bytes or read-only: a clear error, and what was there stays readable."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import time

import pytest
import torch

from upshift.checkpoint import Saver, Store
from upshift.checkpoint.disk import Disk
from upshift.errors import CheckpointError
from upshift.testing.crashes import forked, recovered, same, state
from upshift.testing.disks import CHANGES, ShortDisk, failing


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no filesystem can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_found_before_anything_is_written(small_disk):
    with Store(small_disk) as store:
        store.save(1, state(1))
        with pytest.raises(CheckpointError, match=r"step 2 was not written: it takes .* bytes, .* are free") as caught:
            store.save(2, {"x": torch.zeros(4 * 2**20)})
        assert "Free some space" in caught.value.remedy
    assert recovered(small_disk, acknowledged=1) == []


def test_a_disk_that_fills_up_while_writing(small_disk, monkeypatch):
    monkeypatch.setattr(Disk, "free", lambda self, path: 2**40)
    with Store(small_disk) as store:
        store.save(1, state(1))
        for _ in range(2):
            with pytest.raises(CheckpointError, match="No space left"):
                store.save(2, {"x": torch.zeros(4 * 2**20)})
        assert not list(store.folder.glob(".tmp-*")), "what was half written takes no space"
        store.save(3, state(3))
    assert recovered(small_disk, acknowledged=3) == []


def test_training_goes_on_when_the_disk_is_full(tmp_path):
    said = []
    with Store(tmp_path, say=said.append, disk=failing(("write",), errno.ENOSPC, after=20)) as store:
        saver = Saver(store)
        for step in range(1, 6):
            saver.save(step, state(step))
        last = saver.wait()
        assert saver.failures and isinstance(saver.error, CheckpointError) and last is not None
        assert said[-1].startswith("not saved, training goes on: the checkpoint of step 5 was not written: No space")
    assert recovered(tmp_path, acknowledged=last.step) == []


def test_a_file_larger_than_allowed(tmp_path):
    """A quota on the size of files, in a process of its own."""

    def act():
        with Store(tmp_path) as store:
            store.save(1, state(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                store.save(2, {"x": torch.zeros(10**6)})
            except CheckpointError as error:
                os._exit(7 if "File too large" in error.message else 8)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(act), 0)[1]) == 7
    assert recovered(tmp_path, acknowledged=1) == []


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_every_call_that_fails_is_an_error_and_harms_nothing(tmp_path, name, number):
    with Store(tmp_path) as store:
        store.save(1, state(1))
    begun = time.monotonic()
    disk = failing((name,), number)
    store, acknowledged = Store(tmp_path, disk=disk), 1
    try:
        store.acquire()
        store.save(2, state(2))
        acknowledged = 2
        assert name in ("make_folder", "unlink", "remove_folder"), f"{name} failed and was not noticed"
    except CheckpointError as error:
        assert os.strerror(number) in error.message and error.remedy
    finally:
        store.close()
    assert time.monotonic() - begun < 2.0
    assert recovered(tmp_path, acknowledged) == []


def test_an_old_checkpoint_that_cannot_be_deleted_is_told(tmp_path):
    said = []
    with Store(tmp_path, say=said.append, disk=failing(("unlink",), errno.EACCES)) as store:
        for step in (1, 2, 3):
            store.save(step, state(step))
        assert "could not be removed: Permission denied" in said[0]
    assert recovered(tmp_path, acknowledged=3) == []


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_writes_and_reads_are_gone_on_with(tmp_path, most):
    with Store(tmp_path, disk=ShortDisk(most)) as store:
        store.save(1, state(1))
        assert same(store.load(store.newest())[0], state(1))
    assert recovered(tmp_path, acknowledged=1) == []


def test_a_disk_that_takes_no_bytes_and_says_nothing(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, state(1))
        store._disk = ShortDisk(0)
        with pytest.raises(CheckpointError, match="nothing was written"):
            store.save(2, state(2))
    assert recovered(tmp_path, acknowledged=1) == []


def test_a_disk_that_stores_other_bytes_than_it_was_given(tmp_path):
    class Lying(Disk):
        lies = False

        def write(self, fd, data):
            return super().write(fd, memoryview(bytes(len(data))) if self.lies and len(data) > 200 else data)

    disk, said = Lying(), []
    with Store(tmp_path, say=said.append, disk=disk) as store:
        store.save(1, state(1))
        disk.lies = True
        with pytest.raises(CheckpointError, match="did not read back"):
            store.save(2, state(2))
        assert "quarantine" in said[0]
    assert recovered(tmp_path, acknowledged=1) == []


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path):
    class Broken(Disk):
        def read(self, fd, into):
            if "step-2" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(fd, into)

    with Store(tmp_path) as store:
        store.save(1, state(1))
        store.save(2, state(2))
    said = []
    with Store(tmp_path, say=said.append, disk=Broken()) as store:
        assert store.newest().step == 1 and "Input/output error" in said[0]


def test_a_read_only_folder_is_found_at_the_start(tmp_path):
    folder = tmp_path / "ro"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no filesystem can be mounted here")
    try:
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
            Store(folder / "run").acquire()
        assert time.monotonic() - begun < 2.0
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Store(tmp_path / "run").acquire()
    assert Store(tmp_path / "run").checkpoints() == []
