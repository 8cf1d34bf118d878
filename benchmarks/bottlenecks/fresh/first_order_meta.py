"""First-order meta-learning, whose inner gradients still carry a graph that nothing uses."""

import argparse
import itertools
import math

import torch
from torch import nn
from torch.func import functional_call


def sines(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a sine wave with a random amplitude and phase: two (count, 1) tensors."""
    x = torch.rand(count, 1) * 10 - 5
    return x, (torch.rand(()) * 4 + 0.1) * torch.sin(x + torch.rand(()) * math.pi)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(19)
    model = nn.Sequential(
        nn.Linear(1, 256), nn.Softplus(), nn.Linear(256, 256), nn.Softplus(), nn.Linear(256, 256), nn.Softplus(),
        nn.Linear(256, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in itertools.count():
        x, y = sines(400)
        weights = dict(model.named_parameters())
        for _ in range(3):
            loss = nn.functional.mse_loss(functional_call(model, weights, x[:200]), y[:200])
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=not args.fixed)
            weights = {
                name: weight - 0.01 * gradient.detach()
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        loss = nn.functional.mse_loss(functional_call(model, weights, x[200:]), y[200:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"{step}: {loss.item():.3f}")


if __name__ == "__main__":
    main()
