"""Jobs for the tests: small, with everything that has a state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from upshift import Job, Target, Weighted
from upshift.engine.averages import Ema
from upshift.engine.schedules import cosine

torch.set_num_threads(1)

_generator = torch.Generator().manual_seed(0)
X = torch.randn(512, 12, generator=_generator)
Y = (X @ torch.randn(12, 4, generator=_generator)).argmax(1)


class Net(torch.nn.Module):
    """An MLP with dropout and batch normalisation."""

    def __init__(self, width: int = 24, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(12, width),
            torch.nn.BatchNorm1d(width) if norm else torch.nn.Identity(),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
        )
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 12) to (n, 4)."""
        found: torch.Tensor = self.head(self.body(x))
        return found


class Augmented(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples with noise drawn anew every time."""

    def __len__(self) -> int:
        return 320

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index] + 0.05 * torch.randn(12), Y[index]


class Streamed(torch.utils.data.IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same, which can only be read from the first to the last."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return map(Augmented().__getitem__, range(320))


full = Job(
    model=Net,
    train_data=(X[:320], Y[:320]),
    eval_data=(X[320:], Y[320:]),
    loss=F.cross_entropy,
    optimizer=partial(torch.optim.AdamW, lr=5e-3),
    schedule=cosine(warm_up=5),
    average=Ema(0.9),
    metrics={"accuracy": "accuracy"},
    clip=1.0,
    global_batch=48,
    epochs=4,
    seed=3,
)

plain = Job(
    model=partial(Net, dropout=0.0, norm=False),
    train_data=(X[:320], Y[:320]),
    loss=F.cross_entropy,
    optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    global_batch=48,
    epochs=2,
)

augmented = full.set(train_data=Augmented(), epochs=3)


def tokens(output: torch.Tensor, target: torch.Tensor) -> Weighted:
    """A sum over the samples of even class, to be divided by their number."""
    counted = target % 2 == 0
    losses = F.cross_entropy(output, target, reduction="none")
    return Weighted((losses * counted).sum(), counted.sum())


weighted = plain.set(loss=tokens)


def poisoned(at: int = 7, times: int = 1) -> Job:
    """The loss of update `at` is not finite, `times` times."""
    left = [times]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        found = F.cross_entropy(output, target)
        if output.requires_grad and left[0] and _same(target, at):
            left[0] -= 1
            return found * float("nan")
        return found

    return full.set(loss=loss)


def _same(target: torch.Tensor, at: int) -> bool:
    from upshift.engine.order import order

    rows = order(320, 3, at // 7)[(at % 7) * 48 : (at % 7) * 48 + 48]
    return target.shape == (len(rows),) and bool((target == Y[rows]).all())


def slow(seconds: float = 0.02, epochs: int = 400, workers: bool = False) -> Job:
    """Takes its time, so that it can be interrupted."""
    import time

    def forward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        time.sleep(seconds)
        found: torch.Tensor = model(batch[0])
        return found

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(output, batch[1])

    return full.set(
        forward=forward, loss=loss, epochs=epochs, metrics={}, target=None,
        **({"train_data": Augmented()} if workers or os.environ.get("TINY_WORKERS") else {}),
    )  # fmt: skip


with_target = full.set(target=Target("accuracy", 0.5), stop_at_target=True, epochs=50)
