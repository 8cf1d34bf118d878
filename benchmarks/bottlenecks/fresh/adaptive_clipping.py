"""Adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171), one parameter at a time in Python."""

import argparse
import itertools

import torch
from torch import nn


@torch.no_grad()
def clip_by_unit(model: nn.Module, limit: float = 0.02) -> None:
    """Hold the gradient of each unit to a share of the unit's weight, by their norms."""
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        axes = tuple(range(1, parameter.ndim)) or (0,)
        weight = torch.linalg.vector_norm(parameter, dim=axes, keepdim=True).clamp(min=1e-3)
        gradient = torch.linalg.vector_norm(parameter.grad, dim=axes, keepdim=True).clamp(min=1e-6)
        allowed = weight * limit
        clipped = parameter.grad * (allowed / gradient)
        parameter.grad.copy_(torch.where(gradient > allowed, clipped, parameter.grad))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(23)
    net = nn.Sequential(nn.Linear(20, 56), *(Residual(56) for _ in range(36)), nn.Linear(56, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, fused=True)
    points = torch.randn(4000, 20)
    inside = (points[:, :4].square().sum(dim=1) < 3.4).long()
    for step in itertools.count():
        rows = torch.randint(0, 4000, (64,))
        loss = nn.functional.cross_entropy(net(points[rows]), inside[rows])
        optimizer.zero_grad()
        loss.backward()
        if args.fixed:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        else:
            clip_by_unit(net)
        optimizer.step()
        if step % 200 == 0:
            print(step, f"{loss.item():.3f}")


if __name__ == "__main__":
    main()
