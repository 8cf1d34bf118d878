"""expandable_segments: what goes into the environment, and what PyTorch makes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from upshift.sites import NoEffect, ProcessEnv
from upshift.techniques import expandable_segments
from upshift.techniques.expandable_segments import ExpandableSegments
from upshift.testing.contract import measurement

TECHNIQUE = ExpandableSegments()
NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(expandable_segments, "kinds_here", lambda: ("cuda", "cpu"))


def at(env):
    return TECHNIQUE.at(ProcessEnv(env=env), {})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {NEW: "expandable_segments:True"}),
        ({NEW: ""}, {NEW: "expandable_segments:True"}),
        ({OLD: "max_split_size_mb:128"}, {OLD: "max_split_size_mb:128,expandable_segments:True"}),
        ({NEW: "backend:native, "}, {NEW: "backend:native,expandable_segments:True"}),
    ],
)
def test_what_the_user_has_set_is_kept(gpu, before, after):
    env = dict(before)
    applied = at(env)
    assert env == after and applied.note
    applied.close()
    applied.close()
    assert env == before


@pytest.mark.parametrize(
    "env",
    [
        {OLD: "expandable_segments:False"},
        {NEW: "backend:cudaMallocAsync"},
        {NEW: "max_split_size_mb:128", OLD: "max_split_size_mb:64"},
    ],
)
def test_what_the_user_decided_wins(gpu, env):
    before = dict(env)
    assert isinstance(at(env), NoEffect) and env == before


def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr(expandable_segments, "kinds_here", lambda: ("cpu",))
    env = {}
    assert isinstance(at(env), NoEffect) and not env


def test_check():
    assert TECHNIQUE.check(measurement(device="cuda:0")).applies and not TECHNIQUE.check(measurement()).applies


@pytest.mark.cuda
@pytest.mark.parametrize("set_already", [{}, {OLD: "max_split_size_mb:128"}])
def test_on_cuda_pytorch_takes_it(set_already):
    env = {key: value for key, value in os.environ.items() if key not in (NEW, OLD)} | set_already
    at(env)
    code = (
        "import torch\nx = torch.zeros(2**20, device='cuda')\n"
        "print(any(item['is_expandable'] for item in torch.cuda.memory_snapshot()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr
