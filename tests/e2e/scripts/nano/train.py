"""Configured by a file that is executed in these globals."""

import os
import sys

import torch


steps = 3
width = 4
exec(open(os.path.join(os.path.dirname(__file__), "configurator.py")).read())  # noqa: SIM115
config = {key: value for key, value in globals().items() if type(value) is int}
print(config, __name__, __package__, __spec__.name, os.path.relpath(__file__), sys.path[0] == os.getcwd())
print([os.path.basename(sys.argv[0]), *sys.argv[1:]])
torch.manual_seed(1)
model = torch.nn.Linear(width, 1)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(steps):
    loss = model(torch.randn(5, width)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(repr(loss.item()))
