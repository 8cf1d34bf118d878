"""denormals: the mode reaches worker threads, and goes away again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from upshift.sites import NoEffect, ProcessStart, Stage
from upshift.techniques.denormals import Denormals, dismiss_workers, flushed_share
from upshift.testing.contract import measurement

TECHNIQUE = Denormals()

SUPPORTED = torch.set_flush_denormal(False)
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this CPU cannot flush denormal numbers")


@pytest.fixture(autouse=True)
def two_threads_not_flushing():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_flush_denormal(False)
    dismiss_workers()
    yield
    torch.set_flush_denormal(False)
    dismiss_workers()
    torch.set_num_threads(before)


def test_all_threads_are_switched_live():
    said = []
    stage = Stage([(TECHNIQUE, {})], lambda *item: said.append(item))
    assert flushed_share() == 0.0
    stage.raise_site(ProcessStart())
    assert flushed_share() == 1.0
    assert said == [("applied", "denormals", "denormal numbers are flushed to zero in all CPU threads")]
    for on in (False, True, False, True):
        stage.switch(["denormals"] if on else [])
        assert flushed_share() == float(on)
    stage.close()
    assert flushed_share() == 0.0


def test_torch_alone_leaves_worker_threads_as_they_were():
    """Why the worker team is dismissed: the mode belongs to a thread, and workers inherit it at birth."""
    assert flushed_share() == 0.0  # a team exists now
    torch.set_flush_denormal(True)
    share = flushed_share()
    if share == 1.0:
        pytest.skip("this OpenMP runtime copies the mode to its workers by itself")
    assert 0.0 < share < 1.0
    assert dismiss_workers()
    assert flushed_share() == 1.0


def test_flushing_already_has_no_effect():
    torch.set_flush_denormal(True)
    dismiss_workers()
    outcome = TECHNIQUE.at(ProcessStart(), {})
    assert isinstance(outcome, NoEffect) and "already" in outcome.reason


def test_normal_numbers_are_untouched():
    smallest = torch.tensor([torch.finfo(torch.float32).tiny])
    applied = TECHNIQUE.at(ProcessStart(), {})
    assert torch.equal(smallest * 1.0, smallest)
    assert float(smallest * 0.5) == 0.0
    applied.close()
    assert float(smallest * 0.5) > 0.0


def test_a_script_that_forks_after_it_can_still_compute():
    """The probe runs over all threads; a fork after that would hang if the team were still there."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
from upshift.sites import ProcessStart
from upshift.techniques.denormals import Denormals
applied = Denormals().at(ProcessStart(), {})
child = os.fork()
if child == 0:
    x = torch.ones(1 << 20) * 2
    os._exit(0 if float(x.sum()) == 2 << 20 else 1)
signal.alarm(30)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done


def test_check():
    assert TECHNIQUE.check(measurement()).applies
    assert not TECHNIQUE.check(measurement(flush_denormal=True)).applies
    assert not TECHNIQUE.check(measurement(device="cuda:0")).applies
