"""The whole chain through the real command line: diagnose, tune, run, report, on a script with a planted bottleneck."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from conftest import UPSHIFT, execute, python

#: Reading a sample takes 3 ms, and always gives the same: a cache must win, and nothing may change.
SLOW_DATA = """
import argparse, time
import torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(160, 16, generator=generator)
        self.y = (self.x[:, 0] > 0).long()
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        time.sleep(0.003)  # decoding
        return self.x[index] * 2, self.y[index]

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2000)
    args = parser.parse_args()
    torch.manual_seed(0)
    loader = DataLoader(Slow(), batch_size=16, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        print(epoch, repr(loss.item()))
        torch.save(model.state_dict(), "best.pt")
    print("final", repr(sum(p.double().sum().item() for p in model.parameters())))

if __name__ == "__main__":
    main()
"""


def tree(folder: Path) -> dict[str, str]:
    """Name -> digest of every file that is not upshift's own."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".upshift" not in path.parts and not path.name.endswith(".upshift.toml")
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "train.py").write_text(SLOW_DATA)
    (folder / "best.pt").write_bytes(b"the user's own good checkpoint")
    before = tree(folder)
    command = [UPSHIFT, "tune", "--budget", "70s", "--only", "cache", "--only", "bf16", "--json", "r.json", "train.py"]
    ended = execute(command, folder, timeout=280)
    assert ended.code == 0, ended.err
    assert ended.out == ""
    return folder, before, "\n".join([*ended.said, ended.err])


@pytest.mark.slow
def test_the_cache_is_found_proven_bitwise_and_written_to_the_plan(tuned: tuple[Path, dict[str, str], str]) -> None:
    folder, _, said = tuned
    (section,) = tomllib.loads((folder / "train.upshift.toml").read_text())["devices"].values()
    assert [item["name"] for item in section["kept"]] == ["cache"], said
    assert section["low"] > 1.5
    assert section["proof"]["rung"] == "bitwise" and section["proof"]["passed"]
    report = json.loads((folder / "r.json").read_text())
    assert report["final"]["low"] == section["low"]
    assert report["proof"]["stock_losses"] == report["proof"]["planned_losses"] != []


@pytest.mark.slow
def test_nothing_of_the_users_was_touched(tuned: tuple[Path, dict[str, str], str]) -> None:
    folder, before, _ = tuned
    after = {name: value for name, value in tree(folder).items() if name != "r.json"}
    assert after == before


@pytest.mark.slow
def test_run_applies_the_plan_and_gives_the_same_bits_as_python(tuned: tuple[Path, dict[str, str], str]) -> None:
    folder, _, _ = tuned
    plain = python("train.py", "--epochs", "4", cwd=folder)
    planned = execute([UPSHIFT, "run", "train.py", "--epochs", "4"], folder)
    assert planned.code == 0, planned.err
    assert planned.out == plain.out and "final" in plain.out
    assert any("cache" in line for line in planned.said)
    drawn = execute([UPSHIFT, "report"], folder)
    assert drawn.code == 0 and "cache" in drawn.err


@pytest.mark.extra
def test_an_edited_setting_or_script_makes_the_plan_stale(
    tuned: tuple[Path, dict[str, str], str], tmp_path: Path
) -> None:
    folder, _, _ = tuned
    plan = (folder / "train.upshift.toml").read_text()
    (tmp_path / "train.py").write_text(SLOW_DATA.replace("0.003", "0.0"))
    (tmp_path / "train.upshift.toml").write_text(plan)
    ended = execute([UPSHIFT, "run", "train.py", "--epochs", "1"], tmp_path)
    assert ended.code == 0 and any("the script has changed" in line and "baseline" in line for line in ended.said)
    allowed = execute([UPSHIFT, "run", "--allow-stale", "train.py", "--epochs", "1"], tmp_path)
    assert allowed.code == 0 and any("cache" in line for line in allowed.said)
    (tmp_path / "train.upshift.toml").write_text(re.sub(r'name = "cache"', 'name = "cash"', plan))
    wrong = execute([UPSHIFT, "run", "train.py"], tmp_path)
    assert wrong.code == 3 and any("cash" in line for line in wrong.said)


@pytest.mark.slow
def test_ctrl_c_ends_a_search_with_a_plan_and_nothing_left_behind(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SLOW_DATA)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [UPSHIFT, "tune", "--budget", "120s", "--only", "cache", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "starting a fresh process" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "keep your baseline" in rest.lower()
    assert (tmp_path / "train.upshift.toml").exists()
    assert list(scratch.iterdir()) == []
    resumed = execute([UPSHIFT, "tune", "--resume", "--dry-run", "train.py"], tmp_path)
    assert resumed.code == 0 and any("resuming" in line for line in resumed.said)


@pytest.mark.slow
def test_diagnose_finds_the_planted_bottleneck_at_its_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SLOW_DATA)
    ended = execute([UPSHIFT, "diagnose", "--no-probe", "--seconds", "6", "--json", "m.json", "train.py"], tmp_path)
    assert ended.code == 0, ended.err
    measurement = json.loads((tmp_path / "m.json").read_text())
    phases = {item["name"]: item for item in measurement["anatomy"]["phases"]}
    assert phases["data"]["share"]["value"] > 0.7
    total = sum(item["seconds"]["value"] or 0.0 for item in phases.values())
    assert total == pytest.approx(measurement["anatomy"]["step"]["value"], rel=1e-6)
    assert phases["h2d"]["seconds"]["value"] is None
    top = max(measurement["lines"], key=lambda item: item["share"]["value"])
    assert "time.sleep(0.003)" in top["text"] and top["kind"] == "data"
