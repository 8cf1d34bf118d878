"""benchmarks/gpu.py without a GPU: its scripts train at a tiny size and tell of themselves, and its table is right."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from upshift.records.plan import Fingerprint, Kept, Plan, Proof

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

TINY = {
    "gpt2": "--layers 1 --heads 2 --width 16 --length 16 --vocabulary 64 --batch 4",
    "resnet50": "--width 4 --size 32 --images 32 --batch 8 --workers 0",
}


@pytest.fixture
def load(monkeypatch):
    def named(name, folder="."):
        monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return named


@pytest.mark.parametrize("name", TINY)
def test_scripts_train_and_tell_what_they_did(load, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, *TINY[name].split(), "--steps", "13"])
    load(name, "gpu").main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert said[0]["per_step"] == {"gpt2": 4 * 2 * 16, "resnet50": 8}[name] and said[0]["flops_per_unit"] > 0
    assert said[1]["per_second"] > 0 and said[1]["steps"] == 3


def test_the_models_have_the_size_they_are_named_for(load):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        gpt = load("gpt2", "gpu").GPT(50_304, 1024, 12, 12, 768)
        net, image = load("resnet50", "gpu").resnet(), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counted:
            net(image)
    assert sum(item.numel() for item in gpt.parameters()) == 124_475_904
    assert sum(item.numel() for item in net.parameters()) == 25_557_032
    assert counted.get_total_flops() / 2 == pytest.approx(4.09e9, rel=0.001)  # the constant in the script


def plan(**more):
    none = Fingerprint(script="", sources="", arguments="", device="", versions="")
    return Plan(script="a.py", arguments=(), created="", device="cuda X", verdict="", fingerprint=none, **more)


def test_the_table_shows_figures_ratio_and_what_went_wrong(load):
    gpu = load("gpu")
    stock, planned = gpu.Alone("tokens", 1e9, 100_000.0), gpu.Alone("tokens", 1e9, 150_000.0)
    kept = plan(speedup=1.4, low=1.3, high=1.5, kept=(Kept(name="fused", numerics="rounding"),),
                proof=Proof(rung="trajectory", passed=True, reason=""))  # fmt: skip
    rows = [
        gpu.Row("first", stock, planned, kept, 99.6),
        gpu.Row("second", stock, stock, plan(), 12.0),
        gpu.Row("third", gpu.Alone("?", 0.0, None, "exit code 1: out of memory"), stock, None, 5.0, "tune ended"),
    ]
    lines = gpu.table(rows, 4e14).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert cells[0] == ["first", "100,000 tokens/s", "25.0%", "fused", "trajectory", "1.40x (1.30 to 1.50)",
                        "150,000 tokens/s", "37.5%", "1.50", "100 s"]  # fmt: skip
    assert cells[1][3:6] == ["baseline", "-", "-"] and cells[1][8] == "-"
    assert cells[2][1:4] == ["unknown ?/s", "unknown", "unknown"] and lines[-1] == "third: tune ended"
    assert {line.count("|") for line in lines[:5]} == {11}
    assert "unknown" in gpu.table(rows[:1], None)


def test_a_script_that_fails_or_hangs_is_told(load, tmp_path):
    gpu = load("gpu")
    (tmp_path / "bad.py").write_text("import sys\nsys.exit('no memory')\n")
    assert gpu.alone([sys.executable, "bad.py"], tmp_path, 60).failure == "exit code 1: no memory"
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    assert gpu.alone([sys.executable, "slow.py"], tmp_path, 1).failure.startswith("exit code 124")


def test_the_page_lists_every_technique_not_tested_on_a_cpu():
    from upshift.techniques import registry

    page = (BENCHMARKS.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE))
    assert {item.card.name for item in registry.all_techniques() if "cpu" not in item.card.tested_on} <= listed
    assert listed <= set(registry.names())
