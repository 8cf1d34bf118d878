"""`upshift run` with a plan whose technique harms the training from some step on: it comes off, and that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import python, upshift

from upshift.hardware.device import device_name
from upshift.measure.band import band_of
from upshift.records import planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept, Plan
from upshift.records.runfold import fold
from upshift.records.trial import Proof

# Slow enough for several windows of the record. Labels turn wrong from step 150 on where the environment says so.
SCRIPT = """
import os, time, torch
torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x @ torch.randn(8, 4)).argmax(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(int(os.environ["STEPS"])):
    i = torch.randint(0, 512, (32,))
    target = torch.randint(0, 4, (32,)) if "WRONG" in os.environ and step >= 100 else y[i]
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x[i]), target)
    loss.backward()
    optimizer.step()
    print(repr(loss.item()))
    time.sleep(float(os.environ["NAP"]))
"""

# What third parties do: an entry point, and a class with a card.
TECHNIQUES = """
import torch
from upshift.sites import Card, Numerics
from upshift.sites.protocol import BaseApplied


def card(name, numerics, precision):
    return Card(name=name, summary="", source="", sites=("optimizer_created",), numerics=numerics,
                switchable="live", targets=("optimizer",), precision=precision)


class Acts(BaseApplied):
    note = "before every step"
    seen = 0

    def before_step(self, optimizer):
        pass


class Decays(Acts):
    def before_step(self, optimizer):
        self.seen += 1
        if self.seen > 100:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.add_(parameter.detach())


class Harmless:
    card = card("harmless", Numerics.ROUNDING, "optimizer")

    def at(self, moment, settings):
        return Acts()


class Harmful:
    card = card("harmful", Numerics.ROUNDING, "bfloat16")

    def at(self, moment, settings):
        return Decays()
"""

POINTS = "[upshift.techniques]\nharmless = planted:Harmless\nharmful = planted:Harmful\n"


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What the untouched script's loss does."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "train.py").write_text(SCRIPT)
    stock = python("train.py", cwd=folder, STEPS="400", NAP="0")
    return [float(line) for line in stock.out.splitlines()]


@pytest.fixture
def planned(tmp_path: Path, write, monkeypatch, losses) -> dict[str, str]:
    """A script with a plan of both techniques, and the environment in which they are installed."""
    write("train.py", SCRIPT)
    write("site/planted.py", TECHNIQUES)
    write("site/planted-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    write("site/planted-1.dist-info/entry_points.txt", POINTS)
    band, _ = band_of(losses)
    monkeypatch.chdir(tmp_path)
    device = device_name("cpu")
    techniques = {"harmless": {}, "harmful": {}}
    plan = Plan(
        script="train.py", arguments=(), created="", device=device, verdict="",
        fingerprint=fingerprint("train.py", (), device, techniques, files=("train.py",), packages=("planted 1",)),
        speedup=1.5,
        kept=tuple(Kept(name=name, numerics="rounding") for name in techniques),
        proof=Proof(rung="trajectory", passed=True, reason="", steps=len(losses), band=band),
    )  # fmt: skip
    planfile.write(tmp_path / "train.upshift.toml", plan)
    return {"PYTHONPATH": str(tmp_path / "site"), "NAP": "0.01", "STEPS": "700"}


def told(tmp_path: Path, ended) -> list[str]:
    lines = [line.removeprefix("upshift: guard: ").strip() for line in ended.said if "guard:" in line]
    (folder,) = (tmp_path / ".upshift" / "runs").iterdir()
    assert [event.text for event in fold(folder).events if event.kind == "guard"] == lines
    return lines


def test_the_one_that_harms_comes_off_and_the_loss_comes_back(tmp_path, planned):
    ended = upshift("run", "train.py", cwd=tmp_path, **planned)
    assert ended.code == 0, ended.err
    off, back = told(tmp_path, ended)
    assert "above the band of the proof" in off and "harmful (rounding) came off, harmless stays" in off
    assert "back in the band" in back and "since harmful came off" in back
    losses = [float(line) for line in ended.out.splitlines()]
    assert sum(losses[-20:]) < sum(losses[:20]) / 2


@pytest.mark.extra
def test_where_the_training_itself_is_the_reason_nothing_stops_and_that_is_said(tmp_path, planned):
    ended = upshift("run", "train.py", cwd=tmp_path, **{**planned, "STEPS": "1100", "WRONG": "1"})
    assert ended.code == 0, ended.err
    lines = told(tmp_path, ended)
    assert [name for line in lines for name in ("harmful", "harmless") if f"{name} (rounding) came off" in line] == [
        "harmful",
        "harmless",
    ]
    assert "although the script runs untouched" in lines[-1] and len(lines) == 3
    assert len(ended.out.splitlines()) == 1100
