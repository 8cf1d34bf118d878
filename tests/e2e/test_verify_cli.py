"""`upshift verify` through the command line: whole runs of a script, with its own metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import upshift

from upshift.api import Target
from upshift.hardware.device import device_name
from upshift.records import Plan, Proof, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept

SCRIPT = """
import csv, sys, torch

torch.manual_seed(7)
x = torch.randn(256, 10)
y = (x.sum(1) + torch.randn(256) > 0).long()
model = torch.nn.Linear(10, 2)
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
with open("log.csv", "w") as file:
    log = csv.writer(file)
    log.writerow(["epoch", "val_f1"])
    for epoch in range(3):
        for batch in torch.randperm(200).split(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(x[200:]).argmax(1) == y[200:]).float().mean().item()
        print(f"epoch {epoch} test accuracy {accuracy:.4f}")
        log.writerow([epoch, accuracy])
torch.save(model.state_dict(), "model.pt")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    techniques = {"fused": {"kind": "fused"}}
    device = device_name("cpu")
    planfile.write(
        Target(str(file)).plan_file,
        Plan(
            script="train.py", arguments=(), created="2026-01-01 00:00:00", device=device, verdict="",
            fingerprint=fingerprint(str(file), (), device, techniques, files=("train.py",)),
            proof=Proof(rung="trajectory", passed=True, reason=""),
            kept=tuple(Kept(name=name, settings=settings) for name, settings in techniques.items()),
        ),
    )  # fmt: skip
    return file


def test_printed_metric_ends_in_the_plan_and_touches_nothing(script: Path) -> None:
    before = script.with_name("train.upshift.toml").read_text()
    done = upshift("verify", "--metric", "accuracy:max", "--margin", "0.5", "--target", "0.1", "--seeds", "2",
                   "--json", "out.json", "train.py", cwd=script.parent)  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == ""
    found = json.loads((script.parent / "out.json").read_text())
    assert found["answer"] == "as good" and len(found["runs"]) == 4
    finals = {run["seed"]: run["values"][-1][1] for run in found["runs"] if run["arm"] == "stock"}
    assert len(set(finals.values())) == 2  # another seed is another run, although the script seeds itself
    assert all(len(run["values"]) == 3 and run["steps"] == 30 for run in found["runs"])
    assert not (script.parent / "model.pt").exists() and not (script.parent / "log.csv").exists()
    after = script.with_name("train.upshift.toml").read_text()
    assert 'rung = "metric"' in after and 'rung = "trajectory"' in before
    ran = upshift("run", "--require", "metric", "train.py", cwd=script.parent)
    assert ran.code == 0 and any("fused" in line for line in ran.said)


@pytest.mark.extra
def test_metric_from_a_csv_file_and_not_shown_is_exit_code_9(script: Path) -> None:
    done = upshift("verify", "--metric", "val_f1:max", "--margin", "1e-9", "--seeds", "2", "-q", "train.py",
                   cwd=script.parent)  # fmt: skip
    assert done.code in (0, 9)
    shown = 'rung = "metric"' in script.with_name("train.upshift.toml").read_text()
    assert shown == (done.code == 0)
    assert "val_f1" in done.err


def test_nothing_to_verify_and_unknown_metric(script: Path) -> None:
    done = upshift("verify", "--metric", "bleu", "--seeds", "2", "-q", "train.py", cwd=script.parent)
    assert done.code == 2 and "test accuracy" in "".join(done.said) + done.err
    script.with_name("train.upshift.toml").unlink()
    done = upshift("verify", "--metric", "accuracy", "-q", "train.py", cwd=script.parent)
    assert done.code == 3 and "upshift tune" in done.err
