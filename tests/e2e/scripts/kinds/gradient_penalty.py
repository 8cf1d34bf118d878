"""WGAN-GP: five critic steps with a gradient penalty (`create_graph=True`) for each step of the generator."""

import torch
from torch import nn

torch.manual_seed(7)
G = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
D = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
opt_G = torch.optim.Adam(G.parameters(), lr=1e-4, betas=(0.0, 0.9))
opt_D = torch.optim.Adam(D.parameters(), lr=1e-4, betas=(0.0, 0.9))


def penalty(real, fake):
    mix = torch.rand(len(real), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_(True)
    (slope,) = torch.autograd.grad(D(between).sum(), between, create_graph=True, retain_graph=True)
    return ((slope.norm(2, dim=1) - 1) ** 2).mean()


for iteration in range(24):
    for _ in range(5):
        real = torch.randn(32, 2) * 0.3 + 1
        fake = G(torch.randn(32, 4)).detach()
        loss_D = D(fake).mean() - D(real).mean() + 10 * penalty(real, fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
    loss_G = -D(G(torch.randn(32, 4))).mean()
    opt_G.zero_grad()
    loss_G.backward()
    opt_G.step()
    print(iteration, repr(loss_D.item()), repr(loss_G.item()))
torch.save({"G": G.state_dict(), "D": D.state_dict()}, "checkpoint.pt")
