"""A tiny training on the CPU and a minimal adapter around it, as the hook is one for a script."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upshift.records.plan import Setting
from upshift.sites import (
    BackwardSeen,
    LoaderArgs,
    LossFunctionSeen,
    ModelSeen,
    OptimizerSeen,
    ProcessEnv,
    ProcessStart,
    Stage,
    Technique,
)
from upshift.testing.seen import defaults

if TYPE_CHECKING:
    import torch

MODELS = ("mlp", "conv", "attention")


def build(kind: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> torch.nn.Module:
    """A tiny model: `mlp` (with two equal blocks), `conv` or `attention`.

    Parameters are drawn in float32 and then cast, so that all dtypes start alike. No parameter has a gradient of zero
    in exact arithmetic (as a bias before a normalisation has): Adam would blow its rounding up to a full step.
    """
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 48, bias=False)
            self.out = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """(batch, 12, 16) -> (batch, 4)."""
            q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(7)
    if kind == "mlp":
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(dropout)) for _ in range(2)]
        net: nn.Module = nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 4))
    elif kind == "conv":
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 9, 4),
        )
    elif kind == "attention":
        net = Attention()
    else:
        raise ValueError(f"no such model: {kind!r}")
    return net if dtype is None else net.to(dtype)


_SHAPES = {"mlp": (8, 16), "conv": (8, 3, 8, 8), "attention": (8, 12, 16)}


def batch(kind: str, step: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step; the same for every arm and dtype."""
    import torch

    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(_SHAPES[kind], generator=generator)
    y = torch.randint(0, 4, (8,), generator=generator)
    return (x if dtype is None else x.to(dtype)), y


@dataclass
class Session:
    """A minimal adapter: raises the sites of one training, as the hook does for a script, and the engine for a job.

    The loader is only asked for, not read: every arm gets the same batches.
    """

    stage: Stage | None
    kind: str
    dtype: torch.dtype | None = None
    optimizer_name: str = "AdamW"

    def __post_init__(self) -> None:
        import torch

        if self.stage is not None:
            self.stage.raise_site(ProcessEnv(env={}))
            self.stage.raise_site(ProcessStart(device="cpu"))
            data = torch.utils.data.TensorDataset(torch.zeros(256, 1))
            self.stage.raise_site(LoaderArgs(args={"dataset": data, "batch_size": 8, "shuffle": True}))
        self.module = build(self.kind, self.dtype)
        arguments: dict[str, Any] = {"lr": 1e-3} if self.optimizer_name != "SGD" else {"lr": 1e-2, "momentum": 0.9}
        self.optimizer: Any = getattr(torch.optim, self.optimizer_name)(self.module.parameters(), **arguments)
        self.steps = 0
        self._seen: set[int] = set()

    def call(self, x: torch.Tensor) -> Any:
        """The model's output, through whatever acts around its call."""
        if self.stage is None:
            return self.module(x)
        if id(self.module) not in self._seen:
            self._seen.add(id(self.module))
            self.stage.raise_site(BackwardSeen(module=self.module, optimizer=self.optimizer))
            self.stage.raise_site(ModelSeen(module=self.module, args=(x,), training=self.module.training))
        call: Callable[..., Any] = self.module
        for _, applied in reversed(self.stage.forward_for(self.module)):
            call = _around(applied, call, self.module)
        return call(x)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The cross entropy, with whatever acts on it."""
        import torch

        arguments: dict[str, Any] = {"input": output, "target": target}
        if self.stage is not None:
            if not self.steps:
                self.stage.raise_site(LossFunctionSeen(name="cross_entropy"))
            for _, applied in self.stage.losses_for("cross_entropy"):
                applied.before_loss(arguments)
        return torch.nn.functional.cross_entropy(**arguments)

    def step(self) -> float:
        """One training step; returns the loss."""
        import torch

        x, y = batch(self.kind, self.steps, self.dtype)
        self.optimizer.zero_grad()
        loss = self.loss(self.call(x), y)
        scaling = None if self.stage is None else self.stage.backward()
        torch.autograd.backward(loss if scaling is None else scaling.scaled(loss))
        if scaling is not None and not scaling.unscaled(self.optimizer):
            self.steps += 1
            return loss.item()
        if self.stage is not None:
            if id(self.optimizer) not in self._seen:
                self._seen.add(id(self.optimizer))
                self.stage.raise_site(OptimizerSeen(optimizer=self.optimizer))
            for _, applied in self.stage.steps_for(self.optimizer):
                applied.before_step(self.optimizer)
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def parameters(self) -> dict[str, torch.Tensor]:
        """A copy of the model's state."""
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}


def _around(applied: Any, call: Callable[..., Any], module: torch.nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: applied.around(call, module, args, kwargs)


@dataclass
class Heard:
    """What the stage said."""

    said: list[tuple[str, str, str]]

    def __call__(self, kind: str, name: str, text: str) -> None:
        self.said.append((kind, name, text))

    def failures(self) -> list[tuple[str, str, str]]:
        """Techniques that raised, or could not be undone."""
        return [item for item in self.said if item[0] in ("failed", "off")]


@contextlib.contextmanager
def staged(technique: Technique, settings: dict[str, Setting] | None = None) -> Iterator[tuple[Stage, Heard]]:
    """A stage with this technique alone; closed at the end."""
    heard = Heard([])
    stage = Stage([(technique, {**defaults(technique), **(settings or {})})], heard)
    try:
        yield stage, heard
    finally:
        stage.close()
        broken = [item for item in heard.said if item[0] == "failed"]
        assert not broken, f"close failed: {broken}"


@contextlib.contextmanager
def same_random() -> Iterator[None]:
    """Leave the global random streams as they were found."""
    import torch

    python, cpu = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
