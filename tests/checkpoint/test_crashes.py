"""Kills, power losses, damage and two owners, a few of each; benchmarks/engine/crash_states.py runs many."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from upshift.checkpoint.store import Store
from upshift.testing import crashes
from upshift.testing.disks import RecordingDisk


@pytest.fixture
def ram(tmp_path):
    """A folder on a memory filesystem where there is one: what is tested is the order of calls, not the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="upshift-test-", dir="/dev/shm") as folder:
        yield Path(folder)


def test_killed_at_every_io_call_nothing_acknowledged_is_lost(ram):
    counts = crashes.kill_at_each_call(ram, saves=3, recovery_every=12)
    assert counts.tried > 60 and counts.problems == []


def test_after_a_power_loss_nothing_acknowledged_is_lost(ram):
    counts = crashes.power_losses(ram, states=200)
    assert counts.tried == 200 and counts.problems == []


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_the_power_losses_find_a_sync_that_was_forgotten(ram, monkeypatch, forgotten):
    """The proof that the test above can fail."""
    monkeypatch.setattr(RecordingDisk, forgotten, lambda self, subject: None)
    assert crashes.power_losses(ram, states=60).problems


def test_killed_at_random_nothing_acknowledged_is_lost(ram):
    counts = crashes.random_kills(ram, kills=20)
    assert counts.tried == 20 and counts.problems == []


def test_every_truncation_and_flipped_bit_is_found(ram):
    counts = crashes.damage(ram, each=100)
    assert counts.tried == 600 and counts.problems == []


def test_of_two_owners_one_wins_and_the_other_changes_nothing(ram):
    counts = crashes.two_owners(ram, pairs=20)
    assert counts.tried == 20 and counts.problems == []


def test_killed_in_a_save_the_next_run_finds_the_same_state(ram):
    """Half of the kills of a training are to be in a save: here at each of its calls, with the state compared."""
    calls = crashes.calls_of_a_save(ram)
    assert calls > 20
    for n in range(1, calls + 2, 3):
        folder = ram / str(n)
        with Store(folder) as store:
            store.save(1, crashes.state(1))
            store.save(2, crashes.state(2))

        def act(folder=folder, n=n):  # six calls take the folder
            from upshift.testing.disks import killed_at

            with Store(folder, disk=killed_at(n + 6)) as store:
                store.save(3, crashes.state(3))

        os.waitpid(crashes.forked(act), 0)
        assert crashes.recovered(folder, acknowledged=2) == []
