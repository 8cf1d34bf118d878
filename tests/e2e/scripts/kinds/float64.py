"""A physics-informed network in double precision: derivatives of the output enter the loss."""

import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.manual_seed(1)
net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
x = torch.linspace(0, 1, 64).reshape(-1, 1).requires_grad_()

for step in range(24):
    u = net(x)
    (slope,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    residual = ((slope + 2 * u) ** 2).mean()
    boundary = (net(torch.zeros(1, 1)) - 1).square().mean()
    loss = residual + boundary
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, repr(loss.item()))
torch.save(net.state_dict(), "checkpoint.pt")
