"""Saving beside the training: the state as it was when asked, one at a time, failures told."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time

import pytest
import torch

from upshift.checkpoint import Pace, Saver, Store, seconds_between
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.interval import MOST_OVERHEAD, daly, young
from upshift.errors import CheckpointError, InUseError
from upshift.testing.crashes import same, state
from upshift.testing.disks import failing


class Gate(Disk):
    """A disk that waits before it creates a file."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()

    def create(self, path):
        self.open.wait(20)
        return super().create(path)


def test_the_state_saved_is_that_of_the_call(tmp_path):
    disk = Gate()
    with Store(tmp_path, disk=disk) as store:
        saver, tree = Saver(store), state(3)
        disk.open.clear()
        stall = saver.save(3, tree, facts={"samples": 9}, best=True)
        assert saver.busy and saver.last is None and stall < 5
        tree["model"]["weight"].zero_()
        disk.open.set()
        assert saver.wait().step == 3 and not saver.busy and saver.error is None
        newest = store.newest()
        found, facts = store.load(newest)
        assert same(found, state(3)) and facts == {"samples": 9} and newest.best


def test_saves_follow_each_other_and_reuse_their_memory(tmp_path):
    with Store(tmp_path) as store:
        saver = Saver(store)
        places = set()
        for step in range(1, 6):
            saver.save(step, state(step))
            places.add(saver._copies["model.weight"].data_ptr())
            saver.wait()
            assert same(store.load(store.newest())[0], state(step))
        assert len(places) == 1 and saver.write_seconds > 0 and saver.stall_seconds > 0


def test_ties_and_memory_formats_pass_through_the_copy(tmp_path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with Store(tmp_path) as store:
        Saver(store).save(1, {"a": weight, "b": weight, "c": weight[:, 0]}, wait=True)
        tree, _ = store.load(store.newest())
    assert tree["a"].data_ptr() == tree["b"].data_ptr() and tree["a"].stride() == weight.stride()
    assert torch.equal(tree["c"], weight[:, 0])


def test_a_failure_is_told_once_a_save_and_does_not_end_the_training(tmp_path):
    said = []
    with Store(tmp_path, say=said.append, disk=failing(("sync",), errno.EIO, after=1)) as store:
        saver = Saver(store)
        for step in (1, 2):
            saver.save(step, state(step), wait=True)
        saver.save(3, {"x": object()}, wait=True)
    assert saver.failures == 3 == len(said) and saver.last is None and isinstance(saver.error, CheckpointError)
    assert "Input/output error" in said[0] and "type object" in said[2]


def test_an_owner_that_was_taken_over_is_known_by_the_error(tmp_path):
    with Store(tmp_path) as store:
        saver = Saver(store)
        (store.folder / "attempt.json").write_text('{"attempt": 5}')
        saver.save(1, state(1), wait=True)
        assert isinstance(saver.error, InUseError)


def test_a_process_that_ends_finishes_the_save_it_began(tmp_path):
    code = f"""
import os; os.environ["OMP_NUM_THREADS"] = "1"
from pathlib import Path
from upshift.checkpoint import Saver, Store
from upshift.testing.crashes import state
Saver(Store(Path({str(tmp_path)!r})).acquire()).save(4, state(4))
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    store = Store(tmp_path)
    assert same(store.load(store.newest())[0], state(4))


# -- how often --------------------------------------------------------------------------------------------------------


def lost(interval, cost, between):
    """Share of the time lost: saving, and on average half an interval and half a save at each interruption."""
    return cost / interval + (interval + cost) / 2.0 / between


@pytest.mark.parametrize("cost", [0.1, 5.0, 60.0])
def test_youngs_interval_loses_least(cost):
    between = 4 * 3600.0
    best = young(cost, between)
    assert lost(best, cost, between) <= min(lost(best * f, cost, between) for f in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0))


def test_dalys_interval_is_youngs_for_short_saves_and_bounded_for_long_ones():
    assert daly(0.01, 10_000.0) == pytest.approx(young(0.01, 10_000.0), rel=2e-3)
    assert daly(5.0, 2.0) == 2.0
    # Daly's figure: C = 5 min, M = 6 h: sqrt(2CM) = 60 min, first correction 5/3 min, second 5/108 min, minus C.
    assert daly(300.0, 6 * 3600.0) == pytest.approx(60 * (60.0 + 5.0 / 3.0 + 5.0 / 108.0 - 5.0))


def test_saving_takes_no_more_than_its_share_nor_queues():
    assert seconds_between(1.0, between=10.0) == pytest.approx(1.0 / MOST_OVERHEAD)
    assert seconds_between(0.001, write=300.0, between=100.0) == 300.0
    assert seconds_between(0.0) == 0.0
    for wrong in ((-1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, 0.0, 0.0), (float("nan"), 0.0, 1.0)):
        with pytest.raises(ValueError):
            seconds_between(*wrong)


def test_pace(monkeypatch):
    now = [0.0]
    pace = Pace(between=3600.0, first=60.0, clock=lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -1.0)
    assert not pace.due()
    now[0] = 60.0
    assert pace.due()
    pace.saved(0.5, 10.0)
    assert not pace.due() and pace.seconds == pytest.approx(daly(0.5, 3600.0))
    now[0] += pace.seconds
    assert pace.due()
