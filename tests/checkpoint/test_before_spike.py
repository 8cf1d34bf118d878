"""A checkpoint gets the mark that keeps it, whole, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os

from upshift.checkpoint.disk import Disk
from upshift.checkpoint.store import Store
from upshift.testing import crashes
from upshift.testing.disks import killed_at


def marked(folder):
    return [item.step for item in Store(folder).checkpoints(verify=True) if item.before_spike and item.verified]


def test_the_mark_keeps_it_and_a_later_one_takes_its_place(tmp_path):
    with Store(tmp_path) as store:
        for step in range(1, 9):
            store.save(step, crashes.state(step))
            if step in (2, 5):
                newest = store.newest()
                store.keep_before_spike(newest)
                store.keep_before_spike(newest)
        assert [item.step for item in store.checkpoints()] == [5, 7, 8]
    assert marked(tmp_path) == [5]
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def test_killed_at_each_call_the_checkpoint_stays_whole(tmp_path):
    seen = set()
    for n in range(1, 30):
        folder = tmp_path / str(n)
        with Store(folder) as store:
            store.save(1, crashes.state(1))
            store.save(2, crashes.state(2))

        def act(folder=folder, n=n):
            with Store(folder, disk=killed_at(n)) as store:
                store.keep_before_spike(store.newest())

        _, status = os.waitpid(crashes.forked(act), 0)
        assert crashes.recovered(folder, acknowledged=2) == []
        seen.add(tuple(marked(folder)))
        if status == 0:
            break
    else:
        raise AssertionError("it never came to its end")
    assert seen == {(), (2,)}


def test_a_mark_that_cannot_be_written_is_told_and_changes_nothing(tmp_path):
    class Full(Disk):
        def rename(self, old, new):
            if old.name.startswith(".tmp-mark"):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().rename(old, new)

    said: list[str] = []
    with Store(tmp_path, disk=Full(), say=said.append) as store:
        store.save(1, crashes.state(1))
        store.keep_before_spike(store.newest())
        assert store.newest().step == 1 and not store.newest().before_spike
        assert not [name for name in os.listdir(store.folder) if name.startswith(".")]
    assert len(said) == 1 and "was not marked" in said[0]
