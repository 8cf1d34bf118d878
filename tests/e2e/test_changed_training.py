"""`upshift run` with a plan that changes the training prints what the script prints with the change made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Ended, often, python, upshift

from upshift.hardware.device import device_name
from upshift.records import planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept, Plan
from upshift.records.runfold import fold
from upshift.records.trial import Proof

# HAND names the changes the script makes itself. Evaluation has the plain loss, and prints the weights it has seen.
SCRIPT = """
import os, torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

hand = os.environ.get("HAND", "").split()
torch.manual_seed(0)
x = torch.randn(640, 8)
y = (x @ torch.randn(8, 4) + torch.randn(640, 4)).argmax(1)
times, smoothing = (4, 0.1) if "batch" in hand else (1, 0.1 if "smoothing" in hand else 0.0)
training = DataLoader(TensorDataset(x[:512], y[:512]), batch_size=8 * times, shuffle=True)
held_out = DataLoader(TensorDataset(x[512:], y[512:]), batch_size=32)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * times, momentum=0.9)


def move(average, current, n):
    get_ema_multi_avg_fn(min(0.99, (1 + int(n)) / (10 + int(n))))(average, current, n)


averaged = AveragedModel(model, multi_avg_fn=move, use_buffers=True) if "average" in hand else None
scheduler = None
if "schedule" in hand:
    # 19 steps of warm-up, then 173 down to zero.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - (step - 19) / 173))
for epoch in range(3):
    model.train()
    for i, t in training:
        optimizer.zero_grad()
        loss = cross_entropy(model(i), t, label_smoothing=smoothing) if smoothing else cross_entropy(model(i), t)
        loss.backward()
        optimizer.step()
        if averaged:
            averaged.update_parameters(model)
        if scheduler:
            scheduler.step()
    print("training", repr(loss.item()))
    evaluated = (averaged.module if averaged else model).eval()
    total = hits = 0
    with torch.no_grad():
        for i, t in held_out:
            out = evaluated(i)
            total += cross_entropy(out, t).item()
            hits += int((out.argmax(1) == t).sum())
    saved = [value for value in evaluated.state_dict().values() if value.is_floating_point()]
    print("held out", repr(total), hits, repr(sum(value.double().sum().item() for value in saved)))
"""

PLANS = {
    "batch smoothing average": {
        "larger_batch": {"factor": 4, "scaling": "linear"},
        "label_smoothing": {"smoothing": 0.1},
        "ema": {"decay": 0.99},
    },
    "schedule smoothing": {
        "schedule": {"kind": "linear", "steps": 192, "warmup": 0.1},
        "label_smoothing": {"smoothing": 0.1},
    },
}

# All variants by hand in one process.
BY_HAND = """
import os, runpy, sys
for hand in sys.argv[1:]:
    os.environ["HAND"] = hand
    print(f"# {hand}")
    runpy.run_path("train.py")
"""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the script prints with the changes made by hand, and untouched."""
    folder = tmp_path_factory.mktemp("hand")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "hand.py").write_text(BY_HAND)
    ended = python("hand.py", "untouched", *PLANS, cwd=folder)
    assert ended.code == 0, ended.err
    parts = (part.partition("\n") for part in ended.out.split("# ")[1:])
    return {name: printed for name, _, printed in parts}


def run_with(folder: Path, techniques: dict[str, dict]) -> Ended:
    (folder / "train.py").write_text(SCRIPT)
    device = device_name("cpu")
    plan = Plan(
        script="train.py", arguments=(), created="", device=device, verdict="",
        fingerprint=fingerprint("train.py", (), device, techniques, files=("train.py",)), speedup=1.5,
        kept=tuple(Kept(name=name, settings=found, numerics="changes_training") for name, found in techniques.items()),
        proof=Proof(rung="metric", passed=True, reason=""),
    )  # fmt: skip
    planfile.write(folder / "train.upshift.toml", plan)
    return upshift("run", "train.py", cwd=folder)


@pytest.mark.parametrize("name", often(PLANS, next(iter(PLANS))))
def test_a_plan_does_what_a_person_would_do(tmp_path, monkeypatch, by_hand, name):
    monkeypatch.chdir(tmp_path)
    ended = run_with(tmp_path, PLANS[name])
    assert ended.code == 0, ended.err
    assert ended.out == by_hand[name] != by_hand["untouched"]
    said = "".join(ended.said)
    assert all(f"applied {technique}: " in said for technique in PLANS[name])
    assert "no effect" not in said and "came off" not in said
    (record,) = (tmp_path / ".upshift" / "runs").iterdir()
    assert fold(record).steps == (48 if "batch" in name else 192)
