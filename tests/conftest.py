"""What the tests share: one thread a process, tiny scripts, and runs under `python` and under `upshift run`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported: tests run beside each other on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# A process beside each of the many short runs would only take their cores; the tests that want one say so.
os.environ["UPSHIFT_NO_COMPANION"] = "1"

# The same examples every time: a run of the tests speaks of the change, not of chance. `make soak` draws anew.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("anew", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

#: The console script of this environment.
UPSHIFT = str(Path(sys.executable).with_name("upshift"))

TRAIN = """
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
x, y = torch.randn(64, 8), torch.randn(64, 1)
for step in range({steps}):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    print(step, repr(loss.item()))
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended; `said` are the lines upshift wrote, `err` the rest of stderr."""

    code: int
    out: str
    err: str
    said: tuple[str, ...]


def execute(command: list[str], cwd: Path, *, stdin: str | None = None, timeout: float = 280, **env: str) -> Ended:
    """Run a command to its end; standard input is empty unless given."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = done.stderr.splitlines(keepends=True)
    own = tuple(line for line in lines if line.startswith("upshift:"))
    return Ended(done.returncode, done.stdout, "".join(line for line in lines if line not in own), own)


def python(*arguments: str, cwd: Path, **more: str) -> Ended:
    """`python ARGUMENTS`."""
    return execute([sys.executable, *arguments], cwd, **more)


def upshift(*arguments: str, cwd: Path, **more: str) -> Ended:
    """`upshift ARGUMENTS`."""
    return execute([UPSHIFT, *arguments], cwd, **more)


def often(cases: Iterable[Any], *names: Any) -> list[Any]:
    """For `parametrize`: the cases of `names` belong to every run of the tests, the others to `make soak`."""
    rarely = pytest.mark.extra
    found = [
        case if case in names else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=rarely)
        for case in cases
    ]
    assert len(found) > len(names) == sum(case in names for case in cases), "a case is named that is not there"
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a dedented file below `tmp_path`."""

    def to_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return to_file


@pytest.fixture
def train(write: Callable[[str, str], Path]) -> Path:
    """A small training script of five steps."""
    return write("train.py", TRAIN.format(steps=5))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no device."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
