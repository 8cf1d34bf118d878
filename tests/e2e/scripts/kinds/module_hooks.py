"""Hooks on modules and tensors: activations recorded, gradients clipped on the way, spectral norm and weight decay."""

import torch
from torch import nn
from torch.nn.utils import parametrizations

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(24, 24)), nn.Linear(24, 1))
activations, norms = {}, []


def remember(name):
    def hook(module, args, output):
        activations[name] = output.detach().abs().mean().item()

    return hook


for name, module in model.named_children():
    module.register_forward_hook(remember(name))
model.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(0),))
model[1].register_full_backward_hook(lambda module, given, received: norms.append(received[0].norm().item()))
for parameter in model.parameters():
    parameter.register_hook(lambda grad: grad.clamp(-0.1, 0.1))

optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
x = torch.randn(64, 10)
y = x.prod(1, keepdim=True)
for step in range(24):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    print(repr(loss.item()), repr(norms[-1]), {name: repr(value) for name, value in activations.items()})
torch.save(model.state_dict(), "checkpoint.pt")
