"""A plan with the techniques for CUDA, run for real: the bitwise ones leave every printed digit as it was."""

from __future__ import annotations

import pytest
from conftest import python, upshift

from upshift.hardware.device import device_name
from upshift.records import planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept, Plan, Proof

SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.use_deterministic_algorithms(DETERMINISTIC)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16 * 16, 10)
).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
data = TensorDataset(torch.randn(256, 3, 16, 16), torch.randint(0, 10, (256,)))
for epoch in range(3):
    for x, y in DataLoader(data, batch_size=16, shuffle=True, num_workers=WORKERS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x.cuda()), y.cuda())
        loss.backward()
        optimizer.step()
        print(repr(loss.item()))
"""


def run_both(folder, techniques, workers, deterministic):
    text = SCRIPT.replace("DETERMINISTIC", str(deterministic)).replace("WORKERS", str(workers))
    (folder / "train.py").write_text(text)
    device = device_name("cuda")
    plan = Plan(
        script="train.py", arguments=(), created="", device=device, verdict="",
        fingerprint=fingerprint("train.py", (), device, techniques, files=("train.py",)), speedup=1.2,
        proof=Proof(rung="trajectory", passed=True, reason=""),
        kept=tuple(Kept(name=name, settings=settings) for name, settings in techniques.items()),
    )  # fmt: skip
    planfile.write(folder / "train.upshift.toml", plan)
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    stock = python("train.py", cwd=folder, **environment)
    planned = upshift("run", "--allow-stale", "--require", "none", "train.py", cwd=folder, **environment)
    assert stock.code == planned.code == 0, planned.err
    return stock, planned


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("techniques", "workers"),
    [({"prefetch": {}, "expandable_segments": {}}, 2), ({"prefetch": {}}, 0), ({"device_dataset": {"share": 0.25}}, 0)],
)
def test_bitwise_techniques_change_no_digit(tmp_path, techniques, workers):
    stock, planned = run_both(tmp_path, techniques, workers, True)
    assert planned.out == stock.out
    for name in techniques:
        assert any(f"applied {name}" in line for line in planned.said) or name == "expandable_segments", planned.said
    assert not any("failed" in line for line in planned.said), planned.said


@pytest.mark.cuda
def test_rounding_techniques_change_little(tmp_path):
    stock, planned = run_both(tmp_path, {"tf32": {}, "cudnn_benchmark": {}}, 0, False)
    losses = [[float(line) for line in ended.out.split()] for ended in (stock, planned)]
    assert losses[1][:8] == pytest.approx(losses[0][:8], rel=0.02)
    assert {"tf32", "cudnn_benchmark"} <= {name for line in planned.said for name in line.replace(":", " ").split()}
