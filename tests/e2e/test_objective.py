"""`upshift tune --objective time-to-target`: another training, decided by whole runs of a real script."""

from __future__ import annotations

import pytest
from conftest import upshift

from upshift.api import load

# Every step costs 30 ms, however large the batch: a larger one makes fewer steps of the same data.
SCRIPT = """
import time, torch
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x = torch.randn(768, 16)
y = (x[:, :4].sum(1) > 0).long()
loader = DataLoader(TensorDataset(x[:512], y[:512]), batch_size=16, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(14):
    model.train()
    for a, b in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(a), b).backward()
        optimizer.step()
        time.sleep(0.03)
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[512:]).argmax(1) == y[512:]).float().mean().item()
    print(f"epoch {epoch} accuracy {accuracy:.4f}", flush=True)
"""

ASKED = ("--objective", "time-to-target", "--metric", "accuracy:max", "--target", "0.93", "--margin", "0.05")


@pytest.mark.extra
@pytest.mark.timeout(900)
def test_a_larger_batch_is_found_and_the_plan_is_used(tmp_path, write):
    write("train.py", SCRIPT)
    tuned = upshift("tune", *ASKED, "--only", "larger_batch", "train.py", cwd=tmp_path)
    assert tuned.code == 0, tuned.err
    (plan,) = load(tmp_path / "train.upshift.toml").values()
    assert list(plan.techniques) == ["larger_batch"], tuned.err
    assert plan.objective == "time-to-target" and plan.proof.rung == "metric" and plan.speedup is None
    assert plan.to_target.low > 1.0 and plan.to_target.n == 3
    assert "Target " in tuned.err and "another training (larger_batch)" in " ".join(tuned.err.split())
    ran = upshift("run", "train.py", cwd=tmp_path)
    assert "sooner, another training, proof 'metric'" in " ".join(ran.said)
    assert len(ran.out.splitlines()) == 14


@pytest.mark.extra
@pytest.mark.timeout(900)
def test_energy_is_estimated_here_and_called_so_everywhere(tmp_path, write):
    # Longer steps than above: start-up is all CPU time, and should not be most of a run.
    write("train.py", SCRIPT.replace("0.03", "0.05"))
    asked = ("--objective", "energy", *ASKED[2:], "--watts", "1:2", "--only", "larger_batch")
    tuned = upshift("tune", *asked, "train.py", cwd=tmp_path)
    assert tuned.code == 0, tuned.err
    told = " ".join(tuned.err.split())
    if "energy is measured" in told:
        pytest.skip("RAPL can be read here")
    assert "it ranks plans as these do" in told and "as given by --watts" in told
    (plan,) = load(tmp_path / "train.upshift.toml").values()
    assert list(plan.techniques) == ["larger_batch"] and plan.objective == "energy", tuned.err
    assert plan.energy.basis == "estimated" and plan.energy.low > 1.0 and plan.energy.n == 3
    assert plan.energy.stock > plan.energy.plan > 0.0
    assert "less energy (estimated)" in told and "faster" not in plan.verdict
    ran = upshift("run", "train.py", cwd=tmp_path)
    assert "less energy (estimated) to the target, proof 'metric'" in " ".join(ran.said)


@pytest.mark.extra
def test_a_whole_run_that_fails_leaves_the_plan_of_the_search_by_step_time(tmp_path, write):
    write("train.py", SCRIPT.replace("accuracy {", "hits {").replace("range(14)", "range(2)"))
    ended = upshift("tune", *ASKED, "--only", "fused", "--budget", "2m", "train.py", cwd=tmp_path)
    assert ended.code == 2 and "accuracy" in "".join(ended.said)
    assert (tmp_path / "train.upshift.toml").exists() and (tmp_path / ".upshift/reports/train.json").exists()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("--objective", "time-to-target"), "--metric accuracy:max --target"),
        (("--objective", "energy"), "--metric accuracy:max --target"),
        (("--objective", "energy", "--metric", "accuracy:max"), "--metric accuracy:max --target"),
        (("--objective", "energy", "--metric", "accuracy:max", "--target", "1", "--watts", "5:2"), "--watts 0.7:3.5"),
        (("--watts", "1:2"), "Name that objective"),
        (("--objective", "cost"), "--price"),
        (("--objective", "cost", "--price", "2", "--metric", "accuracy:max"), "Name both"),
        (("--metric", "accuracy:max"), "upshift verify --metric"),
        (("--fit", "8"), "write 8GiB"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(tmp_path, write, options, remedy):
    write("train.py", "raise SystemExit('never run')")
    ended = upshift("tune", *options, "train.py", cwd=tmp_path)
    assert ended.code == 2 and remedy in ended.err and "never run" not in ended.err


def test_a_direction_nobody_gave_is_asked_for_before_anything_runs(tmp_path, write):
    write("train.py", "raise SystemExit('never run')")
    ended = upshift(
        "tune", "--objective", "time-to-target", "--metric", "wobble", "--target", "3", "train.py", cwd=tmp_path
    )
    assert ended.code == 2 and "NAME:max" in ended.err and "never run" not in ended.err
