"""Arms that cheat: real tiny trainings, and the simulated world of the search's own tests with a dishonest child."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from upshift.measure.lag import lag
from upshift.measure.updates import check_updates
from upshift.records import Proof
from upshift.search.accept import accept
from upshift.search.alike import parted
from upshift.search.duel import Arm
from upshift.sites import Numerics

sys.path.append(str(Path(__file__).parents[1] / "search"))

#: Rows of the data, and of a batch.
ROWS, BATCH = 512, 64


@dataclass
class Training:
    """A step of a small classifier, taken apart so that a cheat can change any part of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: torch.Tensor
    y: torch.Tensor
    rows: torch.Tensor = field(default_factory=lambda: torch.arange(BATCH))
    step: int = 0
    bf16: bool = False
    scale: float = 1.0
    kept: dict[str, Any] = field(default_factory=dict)

    def forward(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.model(self.x[self.rows]).float()

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.forward(), self.y[self.rows]) * self.scale

    def update(self) -> None:
        self.optimizer.step()


#: Gets the training and the name of a moment (`start`, `batch`, `forward`, `backward`, `update`); may replace that part
#: by returning True, where it has done it itself.
Cheat = Callable[[Training, str], Any]


def honest(training: Training, moment: str) -> None: ...


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that a small network learns within some hundred steps, but not within the first ones."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 1, 6, 6, generator=generator)
    teacher = torch.randn(36, 4, generator=generator)
    return x, (x.flatten(1) @ teacher + torch.randn(ROWS, 4, generator=generator)).argmax(1)


def model(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def optimizer(net: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    return torch.optim.Adam(net.parameters(), lr=1e-3)


def trained(
    cheat: Cheat = honest, *, optimizer_name: str = "adam", steps: int = 60, dropout: float = 0.0
) -> tuple[Arm, dict[int, dict[str, np.ndarray]]]:
    """One arm as the search sees it: losses of all steps, and the updates of those that are compared."""
    torch.manual_seed(0)
    net = model(dropout)
    training = Training(net, optimizer(net, optimizer_name), *data())
    choice = torch.Generator().manual_seed(1)
    arm, updates = Arm(0, None, {}), {}  # type: ignore[arg-type]
    cheat(training, "start")
    for step in range(1, steps + 1):
        training.step = step
        training.rows = torch.randint(ROWS, (BATCH,), generator=choice)
        cheat(training, "batch")
        for module in net.modules():
            if isinstance(module, nn.Dropout):  # as the search does for the updates it compares
                module.p = dropout if step > 11 else 0.0
        cheat(training, "forward")
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        cheat(training, "backward")
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        if not cheat(training, "update"):
            training.update()
        updates[step] = {name: (p.detach() - before[name]).numpy().copy() for name, p in net.named_parameters()}
        index = step - 1
        arm.seconds[index], arm.losses[index], arm.backwards[index] = 0.01, [loss.item()], 1
    return arm, updates


def verdict(
    stock: tuple[Arm, dict[int, dict[str, np.ndarray]]],
    planned: tuple[Arm, dict[int, dict[str, np.ndarray]]],
    *,
    numerics: Numerics = Numerics.ROUNDING,
    precision: str = "bfloat16",
    dropout: bool = False,
) -> Proof:
    """What the search says of a plan with these arms."""
    (a, first), (b, second) = stock, planned
    apart = parted(a, b, numerics)
    if apart:
        return Proof(rung="none", passed=False, reason=apart)
    checks: list[Any] = []
    for step in (1, 2, 10):
        checks.append(
            check_updates(step, first[step], second[step], first[step + 1], numerics, precision, earlier=checks)  # type: ignore[arg-type]
        )
    losses = [[arm.losses[i][0] for i in sorted(arm.losses)] for arm in (a, b)]
    return accept(
        numerics, bitwise_equal=losses[0] == losses[1], updates=checks, lag=lag(*losses), losses_seen=True,
        has_dropout=dropout,
    )  # fmt: skip


def curve(steps: int = 200, seed: int = 0, noise: float = 0.05) -> list[float]:
    """Losses of an ordinary training: a power law with noise from batch to batch."""
    rng = random.Random(seed)
    return [1.2 + 3.3 * t**-0.3 + rng.gauss(0, noise) for t in range(1, steps + 1)]
