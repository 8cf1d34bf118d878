"""What a run's record says beside its steps, through the real hook."""

from __future__ import annotations

from conftest import upshift

from upshift.records.runfold import fold

SCRIPT = """
import argparse
import torch
import tensorboardX.writer

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
model[0].bias.requires_grad_(False)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(40, 8), torch.randn(40, 1))
loader = torch.utils.data.DataLoader(data, batch_size=8)
writer = tensorboardX.writer.SummaryWriter()
for epoch in range(args.epochs):
    for x, y in loader:
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    writer.add_scalar("val/accuracy", 0.25 * (epoch + 1), epoch)
writer.add_scalar("val/nan", float("nan"))
"""


def test_metrics_parameters_and_planned_steps_are_in_the_record(write, tmp_path):
    write("tensorboardX/__init__.py", "")
    write("tensorboardX/writer.py", "class SummaryWriter:\n    def add_scalar(self, tag, value, step=None): pass\n"
          "    def add_scalars(self, tag, values, step=None): pass\n")  # fmt: skip
    write("train.py", SCRIPT)
    ended = upshift("run", "-q", "--runs", "runs", "train.py", "--epochs", "4", cwd=tmp_path)
    assert ended.code == 0, ended.err
    (folder,) = (tmp_path / "runs").iterdir()
    run = fold(folder)
    assert run.steps == 20 and run.steps_planned == 20
    values = [event.values for event in run.events if event.kind == "model"]
    assert values == [{"parameters": 8 * 4 + 4 + 1}]
    metrics = [event.values for event in run.events if event.kind == "metrics"]
    assert metrics[-1]["val/accuracy"] == 1.0 and metrics[-1]["val/nan"] is None


def test_horizon_reads_the_command_line_and_the_globals(monkeypatch):
    import argparse
    import sys
    import types

    from upshift.hook.horizon import Horizon

    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert Horizon.of_main().steps(10, 1.0) is None
    main.options = argparse.Namespace(epochs=7)
    assert Horizon.of_main().steps(10, 2.0) == 35
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs=3", "--lr", "0.1"])
    assert Horizon.of_main().steps(10, 1.0) == 30
    monkeypatch.setattr(sys, "argv", ["train.py", "--max-steps", "12"])
    assert Horizon.of_main().steps(None, 1.0) == 12
