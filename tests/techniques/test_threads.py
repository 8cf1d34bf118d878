"""threads: counts set, restored, and overridden."""

from __future__ import annotations

import pytest
import torch

from upshift.sites import ModelSeen, NoEffect, ProcessStart, Stage
from upshift.techniques.threads import Threads, candidates
from upshift.testing.contract import measurement

TECHNIQUE = Threads()


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def stage_with(count):
    said = []
    return Stage([(TECHNIQUE, {"intra": count})], lambda *item: said.append(item)), said


def test_sets_switches_and_restores():
    stage, said = stage_with(1)
    stage.raise_site(ProcessStart())
    assert torch.get_num_threads() == 1 and "1 threads" in said[0][2]
    stage.switch([])
    assert torch.get_num_threads() == 2
    stage.switch(["threads"])
    assert torch.get_num_threads() == 1
    stage.close()
    stage.close()
    assert torch.get_num_threads() == 2


def test_the_same_count_has_no_effect():
    outcome = TECHNIQUE.at(ProcessStart(), {"intra": 2})
    assert isinstance(outcome, NoEffect) and "already" in outcome.reason


def test_a_count_the_script_sets_is_overridden_at_its_first_model_and_given_back():
    stage, _ = stage_with(3)
    stage.raise_site(ProcessStart())
    torch.set_num_threads(1)  # the script
    stage.raise_site(ModelSeen(module=torch.nn.Linear(1, 1)))
    assert torch.get_num_threads() == 3
    stage.switch([])
    assert torch.get_num_threads() == 1
    stage.switch(["threads"])
    assert torch.get_num_threads() == 3
    stage.close()
    assert torch.get_num_threads() == 1


def test_a_count_the_script_sets_later_is_told_and_kept():
    stage, _ = stage_with(1)
    stage.raise_site(ProcessStart())
    torch.set_num_threads(3)
    assert "3 threads" in stage.effects()["threads"]
    stage.close()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("cores", "current", "expected"),
    [(8, 8, (4, 1)), (8, 4, (8, 1)), (2, 2, (1,)), (2, 1, (2,)), (1, 1, ()), (0, 2, (1,)), (4, 0, (4, 2, 1))],
)
def test_candidates(cores, current, expected):
    assert candidates(cores, current) == expected


def test_check():
    verdict = TECHNIQUE.check(measurement(threads=4, cores=4))
    assert verdict.applies and verdict.candidates == ({"intra": 2}, {"intra": 1})
    assert not TECHNIQUE.check(measurement(threads=1, cores=1)).applies
    assert not TECHNIQUE.check(measurement(device="cuda:0")).applies


def test_results_differ_by_rounding_only():
    x = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    reference = x.double() @ x.double()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.allclose((x @ x).double(), reference, atol=1e-3)
