"""`tune --fit` on a script with activations worth saving: one that needs more than is allowed, one that dies of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import UPSHIFT

pytestmark = pytest.mark.extra

#: Activations of 12 blocks, 2 MiB each several times over. LEFT: MiB of address space beyond what torch itself takes.
SCRIPT = """
import os, resource, torch
torch.set_num_threads(1)
torch.manual_seed(0)
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    def forward(self, x):
        return x + self.b(torch.nn.functional.gelu(self.a(torch.tanh(x))))
model = torch.nn.Sequential(*[Block() for _ in range(12)], torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
drawn = torch.Generator().manual_seed(1)
if os.environ.get("LEFT"):
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(os.environ["LEFT"]) * 2**20,) * 2)
for step in range(100_000):
    x = torch.randn(32768, 16, generator=drawn)
    loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).tanh())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def tune(folder: Path, *options: str, **env: str) -> tuple[int, dict[str, object], str]:
    """Exit code, report and output of a search."""
    (folder / "train.py").write_text(SCRIPT)
    command = [UPSHIFT, "tune", "-q", "--json", "out.json",
               "--only", "activation_checkpointing", *options, "train.py"]  # fmt: skip
    # Blocks of memory are given back at once, so that what is held is what is in use.
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=900)
    report = json.loads((folder / "out.json").read_text()) if (folder / "out.json").exists() else {}
    return done.returncode, report, done.stdout + done.stderr


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes the untouched script holds, by a limit that nothing can meet."""
    folder = tmp_path_factory.mktemp("nothing")
    code, report, text = tune(folder, "--fit", "64MiB", "--budget", "60s")
    assert code == 13, text
    fitted = report["fitted"]
    assert isinstance(fitted, dict) and not fitted["fits"] and fitted["held"] < fitted["script"]
    assert "Nothing fits in 64 MiB: the least was" in text
    return int(fitted["script"])


def test_a_script_that_needs_more_gets_the_plan_that_fits(tmp_path: Path, needed: int) -> None:
    limit = needed - 20 * 2**20
    code, report, text = tune(tmp_path, "--fit", f"{limit // 2**20}MiB", "--budget", "120s")
    assert code == 0, text
    fitted, proof = report["fitted"], report["proof"]
    assert report["kept"] == ["activation_checkpointing"]
    assert isinstance(fitted, dict) and fitted["held"] <= limit < fitted["script"]
    assert isinstance(proof, dict) and proof["rung"] == "bitwise"
    assert "activation_checkpointing" in (tmp_path / "train.upshift.toml").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited by the kernel of Linux")
def test_a_script_that_dies_of_memory_gets_a_plan_that_lets_it_run(tmp_path: Path) -> None:
    code, report, text = tune(tmp_path, "--fit", "4GiB", "--budget", "120s", LEFT="65")
    assert code == 0, text
    fitted = report["fitted"]
    assert report["kept"] == ["activation_checkpointing"], text
    assert isinstance(fitted, dict) and fitted["script"] is None and report["final"] is None
    assert "is unknown" in str(report["verdict"])
