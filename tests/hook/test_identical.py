"""Small trainings built out of what people combine: being watched changes no bit, and every step is seen."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from watched import Keeping, watched

from upshift.hook import books as books_module
from upshift.hook.guarded import RunController
from upshift.sites.runner import ChildSpec


class Double(torch.autograd.Function):
    """A custom function, as people write them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return 2 * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sign() / (x.abs().sqrt() + 1e-3)


class Tied(nn.Module):
    """Two layers with one weight, dropout, a batch norm and a custom function."""

    def __init__(self, norm: bool, dropout: float, custom: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)
        self.custom = custom

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        x = Double.apply(x) if self.custom else x
        return self.head(self.second(x))


class Stream(IterableDataset):
    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.rows = list(zip(x, y, strict=True))

    def __iter__(self):
        return iter(self.rows)


@dataclass(frozen=True)
class Loop:
    optimizer: str
    loader: str
    accumulate: int
    norm: bool
    dropout: float
    custom: bool
    frozen: bool
    hooks: bool
    double: bool
    penalty: bool
    clip: bool
    scheduler: bool
    scaler: bool
    adversary: bool
    evaluate: bool


LOOPS = st.builds(
    Loop,
    optimizer=st.sampled_from(["sgd", "momentum", "adamw", "rmsprop", "lbfgs"]),
    loader=st.sampled_from(["none", "map", "iterable"]),
    accumulate=st.integers(1, 3),
    norm=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    custom=st.booleans(),
    frozen=st.booleans(),
    hooks=st.booleans(),
    double=st.booleans(),
    penalty=st.booleans(),
    clip=st.booleans(),
    scheduler=st.booleans(),
    scaler=st.booleans(),
    adversary=st.booleans(),
    evaluate=st.booleans(),
)

STEPS = 12


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=0.01)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9 if name == "momentum" else 0.0)


def batches(loop: Loop, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator).to(dtype)
    y = (x.sum(1) > 0).long()
    if loop.loader == "none":
        while True:
            rows = torch.randint(0, 40, (8,))
            yield x[rows], y[rows]
    data = TensorDataset(x, y) if loop.loader == "map" else Stream(x, y)
    loader = DataLoader(data, batch_size=8, shuffle=loop.loader == "map")
    while True:
        yield from loader


def train(loop: Loop) -> tuple[list[str], dict[str, torch.Tensor], torch.Tensor]:
    """Losses to the last bit, the state dict and the next random numbers."""
    torch.manual_seed(0)
    dtype = torch.float64 if loop.double else torch.float32
    model = Tied(loop.norm, loop.dropout, loop.custom).to(dtype)
    seen: list[float] = []
    if loop.frozen:
        model.first.bias.requires_grad_(False)
    if loop.hooks:
        model.head.register_forward_hook(lambda module, args, output: output * 1.0)
        model.head.register_full_backward_hook(lambda module, g, h: None)
        model.first.weight.register_hook(lambda gradient: seen.append(gradient.abs().sum().item()))
    optimizer = make_optimizer(loop.optimizer, [p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) if loop.scheduler else None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rival = nn.Linear(6, 6).to(dtype)
    rivals = torch.optim.SGD(rival.parameters(), lr=0.01) if loop.adversary else None
    source = batches(loop, dtype)
    losses: list[str] = []

    def backward() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for _ in range(loop.accumulate):
            x, y = next(source) if loop.optimizer != "lbfgs" else fixed
            if loop.adversary:
                x = x + rival(x).detach()
            loss = nn.functional.cross_entropy(model(x), y) / loop.accumulate
            if loop.penalty:
                (gradient,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
                loss = loss + 0.01 * gradient.pow(2).sum()
            (scaler.scale(loss) if loop.scaler else loss).backward()
            total = total + loss.detach()
        if loop.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return total

    fixed = next(source)
    for step in range(STEPS):
        if loop.optimizer == "lbfgs":
            losses.append(float(optimizer.step(backward)).hex())
        else:
            total = backward()
            if loop.scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            losses.append(float(total).hex())
        if rivals is not None:
            rivals.zero_grad()
            x, y = fixed
            (-nn.functional.cross_entropy(model(x + rival(x)), y)).backward()
            rivals.step()
        if schedule is not None:
            schedule.step()
        if loop.evaluate and step % 4 == 3:
            model.eval()
            with torch.no_grad():
                losses.append(float(model(fixed[0]).sum()).hex())
            model.train()
    losses += [value.hex() for value in seen]
    return losses, {name: value.clone() for name, value in model.state_dict().items()}, torch.rand(4)


@contextlib.contextmanager
def short_naps():
    """Steps are only counted soon, and for a while."""
    before = books_module.AWAKE_STEPS, books_module.NAP
    books_module.AWAKE_STEPS, books_module.NAP = 2, 0.005
    try:
        yield
    finally:
        books_module.AWAKE_STEPS, books_module.NAP = before


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), name
    assert torch.equal(a[2], b[2])


@settings(max_examples=60, deadline=None)
@given(LOOPS)
def test_being_watched_changes_no_bit_and_counts_every_step(loop: Loop) -> None:
    plain = train(loop)
    with watched(Keeping()) as seen:
        found = train(loop)
    same(plain, found)
    assert len(seen.records) == STEPS
    assert all(record.losses for record in seen.records)
    for record in seen.records:
        parts = record.data + record.forward + record.loss + record.backward + record.optimizer + record.nograd
        assert 0.0 <= parts <= record.total * (1 + 1e-9) + 1e-9


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LOOPS)
def test_run_without_techniques_changes_no_bit(tmp_path: Path, loop: Loop) -> None:
    plain = train(loop)
    controller = RunController(ChildSpec(mode="run", target="train.py", record=str(tmp_path)))
    controller.quiet = True
    with short_naps(), watched(controller):
        found = train(loop)
        assert controller.watch.index == STEPS
    controller.log.close()
    same(plain, found)
