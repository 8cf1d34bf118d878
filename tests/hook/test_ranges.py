"""Ranges for profilers, drawn by a run that was asked for them, read back by PyTorch's own profiler."""

from __future__ import annotations

from collections import Counter

from conftest import upshift

SCRIPT = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    def forward(self, x):
        return self.b(self.a(x).relu())

torch.manual_seed(0)
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 4)), batch_size=4)
with torch.profiler.profile() as seen:
    for (x,) in loader:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
for event in seen.events():
    if event.name in ("data", "forward", "backward", "optimizer"):
        print(event.name)
print(loss.item())
"""


def test_ranges_are_drawn_on_demand_only_and_change_nothing(write, tmp_path):
    write("train.py", SCRIPT)
    plain = upshift("run", "-q", "train.py", cwd=tmp_path)
    asked = upshift("run", "-q", "train.py", cwd=tmp_path, UPSHIFT_NVTX="1")
    assert plain.code == asked.code == 0, asked.err
    *none, loss = plain.out.splitlines()
    *drawn, same = asked.out.splitlines()
    # The loader is asked once more than it has batches; a module inside the model has no range of its own.
    assert not none and Counter(drawn) == {"data": 4, "forward": 3, "backward": 3, "optimizer": 3}
    assert loss == same
