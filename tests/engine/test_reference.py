"""Finding a job by name, and what the process of a job accepts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from upshift import Job
from upshift.engine.reference import load_job
from upshift.errors import UsageError

FILE = """
from functools import partial
import torch, torch.nn.functional as F
from upshift import Job
X, Y = torch.randn(64, 4), torch.randint(0, 2, (64,))
job = Job(model=lambda: torch.nn.Linear(4, 2), train_data=(X, Y), loss=F.cross_entropy,
          optimizer=partial(torch.optim.SGD, lr=0.1), global_batch=16, epochs=1)
def sized(width, epochs=2):
    return job.set(epochs=epochs, name=f"w{width}")
wrong = 3
def nothing():
    return None
"""


@pytest.fixture
def file(tmp_path, monkeypatch, request):
    path = tmp_path / f"jobs_{abs(hash(request.node.name))}.py"
    path.write_text(FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop(path.stem, None)


def test_a_job_and_a_function_that_returns_one(file):
    assert isinstance(load_job(f"{file}:job"), Job) and load_job(f"{file}:job").name == "job"
    found = load_job(f"{file}:sized", {"width": "8", "steps": "5"})
    assert (found.name, found.steps, found.epochs) == ("w8", 5, None)
    assert load_job(f"{file}:job", {"epochs": "7"}).epochs == 7


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nobody", {}, "has no 'nobody'"),
        ("wrong", {}, "is a int, not a Job"),
        ("nothing", {}, "returned a NoneType"),
        ("sized", {}, "needs width"),
        ("job", {"epoch": "3"}, "no 'epoch'"),
        ("job", {"epochs": "many"}, "epochs is 'many'"),
        ("job", {"epochs": "__import__('os').system('touch hacked')"}, "epochs is"),
    ],
)
def test_what_is_no_job_is_said_with_what_there_is(file, name, settings, words):
    with pytest.raises(UsageError, match=None) as caught:
        load_job(f"{file}:{name}", settings)
    assert words in str(caught.value)
    assert not Path("hacked").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        load_job(f"{tmp_path}/none.py:job")


def launch(*arguments, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "upshift.cli.job", *arguments], cwd=cwd, env={**os.environ, **env}, timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        "{",
        json.dumps({"out": 3}),
        json.dumps({"__class__": "os.system"}),
        json.dumps({"settings": {"epochs": ["!!python/object/apply:os.system", "touch hacked"]}}),
        json.dumps({"plan": {"fused": {"kind": {"a": 1}}}}),
        "[" * 100_000,
    ],
)
def test_a_hostile_spec_is_refused(spec, file):
    done = launch(f"{file.name}:job", cwd=file.parent, UPSHIFT_JOB=spec)
    assert done.returncode == 2 and "UPSHIFT_JOB cannot be read" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and sorted(item.suffix for item in file.parent.iterdir()) == [".py"]


def test_on_the_command_line_a_job_says_what_it_does(file):
    done = launch(f"{file.name}:job", "--set", "epochs=2", cwd=file.parent)
    assert done.returncode == 0 and "8 steps, 128 samples" in done.stderr, done.stderr
    done = launch(f"{file.name}:job", "--lr", "3", cwd=file.parent)
    assert done.returncode == 2 and "no argument '--lr'" in done.stderr


def test_a_plan_holds_for_the_settings_it_was_measured_with(file):
    """However they are written, before the job or behind it; how long it trains does not matter."""
    from upshift.api import Target

    def mark(*arguments):
        return Target(f"{file}:sized", arguments).script.mark({}, "cpu", ()).arguments

    assert mark("--set", "width=8") == mark("--set=width=8") == mark("width=8", "epochs=3") != mark("width=9")
