"""Full-batch LBFGS with a closure: one step evaluates the loss several times."""

import math

import torch
from torch import nn

torch.manual_seed(0)
t = torch.linspace(0, 6 * math.pi, 200)
wave = torch.sin(t).unsqueeze(1)
model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.8, max_iter=5)


def closure():
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(wave[:-1]), wave[1:])
    loss.backward()
    return loss


for step in range(24):
    print("loss:", repr(optimizer.step(closure).item()))
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
