"""Lightning, Hugging Face Trainer and Accelerate, untouched: the same bits, every step seen, one technique at work.

Skipped where they are not installed: `make test-frameworks` installs them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import python, upshift

from upshift.api import Target
from upshift.hardware.device import device_name
from upshift.records import Plan, Proof, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept
from upshift.records.runfold import fold

LIGHTNING = """
import os
import torch, lightning as L
from torch.utils.data import DataLoader, TensorDataset

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    def training_step(self, batch, i):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)
    def validation_step(self, batch, i):
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

L.seed_everything(1, verbose=False)
x = torch.randn(640, 20)
y = (x.sum(1) > 0).long()
model = Net()
trainer = L.Trainer(max_epochs=int(os.environ.get("EPOCHS", "3")), logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
data = TensorDataset(x, y)
trainer.fit(model, DataLoader(data, 32, shuffle=True), DataLoader(data, 64))
print(model.net[0].weight.sum().item().hex())
"""

TRAINER = """
import os, tempfile, torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

class Data(Dataset):
    def __init__(self):
        self.x = torch.randn(320, 20, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.sum(1) > 0).long()
    def __len__(self):
        return 320
    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)
    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

torch.manual_seed(0)
model = Net()
arguments = TrainingArguments(tempfile.mkdtemp(), num_train_epochs=int(os.environ.get("EPOCHS", "2")), report_to=[],
                              per_device_train_batch_size=16, gradient_accumulation_steps=2, save_strategy="no",
                              logging_steps=500, disable_tqdm=True, use_cpu=True)
Trainer(model, arguments, train_dataset=Data()).train()
print(model.layer.weight.sum().item().hex())
"""

ACCELERATE = """
import os, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
x = torch.randn(320, 20)
y = (x.sum(1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(int(os.environ.get("EPOCHS", "3"))):
    for batch, target in loader:
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch), target)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
print(loss.item().hex())
"""

#: Package, script, global steps, batches in one of them, what fused AdamW does there.
SCRIPTS = {
    "lightning": (LIGHTNING, 60, 1, "applied fused"),
    "transformers": (TRAINER, 20, 2, "no effect fused"),
    "accelerate": (ACCELERATE, 60, 1, "applied fused"),
}


@pytest.fixture(params=list(SCRIPTS))
def framework(request, tmp_path: Path):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    source, *rest = SCRIPTS[request.param]
    (tmp_path / "train.py").write_text(source)
    return tmp_path, *rest


def test_the_run_is_the_scripts_own_and_every_global_step_is_seen(framework):
    folder, steps, _, _ = framework
    plain = python("train.py", cwd=folder)
    hooked = upshift("run", "--no-plan", "train.py", cwd=folder)
    assert hooked.code == plain.code == 0, plain.err
    assert hooked.out.splitlines()[-1] == plain.out.splitlines()[-1]
    (record,) = (folder / ".upshift" / "runs").iterdir()
    run = fold(record)
    assert run.steps == steps and run.windows[-1].loss is not None


def test_a_technique_acts_or_says_why_not(framework):
    folder, _, _, said = framework
    techniques = {"fused": {"kind": "fused"}}
    device = device_name("cpu")
    mark = fingerprint(str(folder / "train.py"), (), device, techniques, files=("train.py",))
    planfile.write(
        Target(str(folder / "train.py")).plan_file,
        Plan(
            script="train.py", arguments=(), created="", device=device, verdict="", fingerprint=mark,
            proof=Proof(rung="trajectory", passed=True, reason=""), kept=(Kept("fused", {"kind": "fused"}),),
        ),
    )  # fmt: skip
    hooked = upshift("run", "train.py", cwd=folder)
    assert hooked.code == 0, hooked.err
    assert any(said in line for line in hooked.said), hooked.said


def test_phases_of_a_global_step_are_seen(framework):
    folder, _, batches, _ = framework
    done = upshift("diagnose", "-q", "--no-probe", "--seconds", "4s", "--json", "seen.json", "train.py",
                   cwd=folder, EPOCHS="2000")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((folder / "seen.json").read_text())
    anatomy = found.get("measurement", found)["anatomy"]
    phases = {phase["name"]: phase["seconds"].get("value") for phase in anatomy["phases"]}
    assert all(phases[name] > 0 for name in ("data", "forward", "backward", "optimizer"))
    assert anatomy["micro_batches"]["value"] == batches
    total = sum(value for value in phases.values() if value)
    assert total == pytest.approx(anatomy["step"]["value"], rel=0.05)
