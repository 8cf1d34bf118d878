"""The gradient noise of trainings that run here: its truth is known, and nothing of the training moves meanwhile."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import often, upshift
from torch import nn
from torch.nn import functional as F
from watched import Keeping, watched

from upshift.diagnose import diagnose
from upshift.hook import noise
from upshift.hook.noise import FREE, LEAST, MOST, WINDOW, NoiseListener, steps_within
from upshift.measure.noise_scale import LEAST_WINDOWS
from upshift.records import Measurement
from upshift.records.codec import read
from upshift.records.recipe import GradientNoise

FEATURES, NOISE = 16, 1.0


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else was imported or compiled in this process."""
    monkeypatch.setattr(noise, "FRAMEWORKS", ())
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.utils.counters.clear()


class Listening(Keeping):
    """Lets two steps pass, then listens; `noise` is what was found."""

    def __init__(self, steps: int = 64, seconds: float = 60.0) -> None:
        super().__init__()
        self.steps, self.seconds = steps, seconds
        self.listener: Any = None
        self.noise: GradientNoise | None = None

    def on_step(self, record) -> None:
        super().on_step(record)
        if self.noise is not None:
            return
        if self.listener is not None:
            if self.listener.step_ended():
                self.noise = self.listener.found()
                self.listener.close()
        elif len(self.records) == 2:
            listener = NoiseListener(self.watch, torch, steps=self.steps, seconds=self.seconds, epoch=None)
            if why := listener.obstacle():
                self.noise = GradientNoise(why=why)
            else:
                listener.begin()
                self.listener = listener


class Training:
    """A linear regression on fresh normal data, in float64, whose noise scale follows from its weights."""

    def __init__(self, batch: int = 4, make: Callable = lambda p: torch.optim.SGD(p, lr=0.01), seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.model = nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.model.weight, 0.3)
        self.optimizer = make(self.model.parameters())
        self.batch = batch

    def data(self):
        x = torch.randn(self.batch, FEATURES, generator=self.draw, dtype=torch.float64)
        return x, NOISE * torch.randn(self.batch, 1, generator=self.draw, dtype=torch.float64)

    def loss(self):
        x, y = self.data()
        return F.mse_loss(self.model(x), y) / 2

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def truth(self) -> float:
        """In batches: y is noise alone, so the gradient of the expected loss is the weight itself."""
        square = float((self.model.weight.detach() ** 2).sum())
        return (FEATURES + 1 + FEATURES * NOISE**2 / square) / self.batch


def listen(training: Any, step: Callable | None = None, most: int = 400, **options: Any) -> GradientNoise:
    with watched(Listening(**options)) as seen:
        for _ in range(most):
            (step or training.step)()
            if seen.noise is not None:
                break
    assert seen.noise is not None
    return seen.noise


def test_it_finds_the_scale_of_a_regression_and_holds_the_weights_meanwhile() -> None:
    training = Training(make=lambda p: torch.optim.SGD(p, lr=1e-4))
    before: list[Any] = []

    def step() -> None:
        training.step()
        before.append(training.model.weight.detach().clone())

    found = listen(training, step, steps=MOST)
    windows = MOST // 2 // (WINDOW + FREE)
    assert not found.why and len(before) == MOST + 3 and found.steps == MOST - FREE * windows
    assert found.scale.value == pytest.approx(training.truth(), rel=0.5)
    assert found.scale.low < training.truth() < found.scale.high
    moved = [i for i in range(1, len(before)) if not torch.equal(before[i - 1], before[i])]
    assert moved == [1, 2, *(3 + i * (WINDOW + FREE) + WINDOW + j for i in range(windows) for j in range(FREE))]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
)
def test_no_optimizer_moves_and_the_scripts_own_gradients_and_random_numbers_stay(make: Callable) -> None:
    training = Training(make=make)
    held: list[Any] = []

    def step() -> None:
        random = torch.get_rng_state()
        training.step()
        assert torch.equal(random, torch.get_rng_state()) and training.model.weight.grad is not None
        state = training.optimizer.state[training.model.weight]
        held.append([training.model.weight.detach().clone(), *(torch.as_tensor(v).clone() for v in state.values())])

    assert not listen(training, step, steps=LEAST).why
    moved = [i for i in range(3, len(held)) if not all(map(torch.equal, held[i - 1], held[i]))]
    assert len(held) == LEAST + 3 and len(moved) == FREE * LEAST_WINDOWS


def test_the_same_gradients_are_found_before_they_are_clipped() -> None:
    def clipped(training: Training) -> Callable:
        def step() -> None:
            training.optimizer.zero_grad()
            training.loss().backward()
            nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)
            nn.utils.clip_grad_value_(training.model.parameters(), 1e-4)
            training.optimizer.step()

        return step

    def frozen(p):
        return torch.optim.SGD(p, lr=0.0)

    plain, other = Training(make=frozen), Training(make=frozen)
    assert listen(plain) == listen(other, clipped(other))


def test_accumulated_micro_batches_make_one_gradient() -> None:
    def frozen(p):
        return torch.optim.SGD(p, lr=0.0)

    whole, halves = Training(8, make=frozen), Training(8, make=frozen)

    def step() -> None:
        halves.optimizer.zero_grad()
        x, y = halves.data()
        for part in (slice(0, 4), slice(4, 8)):
            (F.mse_loss(halves.model(x[part]), y[part]) / 4).backward()
        halves.optimizer.step()

    one, two = listen(whole), listen(halves, step)
    assert two.scale.value == pytest.approx(one.scale.value) and two.steps == one.steps
    assert two.scale.low == pytest.approx(one.scale.low)


def test_a_loss_scale_cancels_out_as_long_as_it_stays() -> None:
    def frozen(p):
        return torch.optim.SGD(p, lr=0.0)

    def scaled(training: Training, scaler) -> Callable:
        def step() -> None:
            training.optimizer.zero_grad()
            scaler.scale(training.loss()).backward()
            scaler.unscale_(training.optimizer)
            scaler.step(training.optimizer)
            scaler.update()

        return step

    plain, kept, grows = (Training(make=frozen) for _ in range(3))
    still = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)
    found = listen(kept, scaled(kept, still))
    assert found.scale.value == pytest.approx(listen(plain).scale.value)
    assert found.variance.value == pytest.approx(listen(Training(make=frozen)).variance.value * 1024**2)
    growing = torch.amp.GradScaler("cpu", init_scale=2.0, growth_factor=1.001, growth_interval=1)
    assert "loss scale" in listen(grows, scaled(grows, growing), seconds=0.5, most=100_000).why


def hooked(training: Training) -> None:
    training.model.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def hooked_after(training: Training) -> None:
    def clamp(item) -> None:
        item.grad.clamp_(-0.01, 0.01)

    training.model.weight.register_post_accumulate_grad_hook(clamp)


def hooked_module(training: Training) -> None:
    training.model.register_full_backward_hook(lambda module, into, out: None)


@pytest.mark.parametrize("hook", [hooked, hooked_after, hooked_module])
def test_gradients_clipped_before_they_can_be_read_are_unknown(hook: Callable) -> None:
    training = Training()
    hook(training)
    found = listen(training)
    assert "hooks on" in found.why and found.scale.low is None


class Own(torch.optim.SGD):
    pass


def test_optimizers_whose_steps_cannot_be_withheld() -> None:
    training = Training(make=lambda p: Own(p, lr=0.01))
    assert "Own is not one of torch's optimizers" in listen(training).why

    training = Training(make=lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=1))

    def step() -> None:
        def closure():
            training.optimizer.zero_grad()
            loss = training.loss()
            loss.backward()
            return loss

        training.optimizer.step(closure)

    assert "within its step" in listen(training, step).why


def test_several_optimizers() -> None:
    first, second = Training(), Training(seed=1)

    def step() -> None:
        first.step()
        second.step()

    assert "several optimizers" in listen(first, step).why


def test_what_else_makes_it_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def clamped(training: Training) -> None:
        training.step()
        with torch.no_grad():
            training.model.weight.clamp_(-0.2, 0.2)

    def uncleared(training: Training) -> None:
        training.loss().backward()
        training.optimizer.step()

    def uneven(training: Training) -> None:
        training.batch = 4 if training.batch == 12 else 12
        training.step()

    def infinite(training: Training) -> None:
        training.optimizer.zero_grad()
        (training.loss() * math.inf).backward()
        training.optimizer.step()

    for step, why in (
        (clamped, "weights are changed"),
        (uncleared, "not cleared"),
        (uneven, "differ in size"),
        (infinite, "not finite"),
    ):
        training = Training()
        assert why in listen(training, lambda step=step, it=training: step(it), seconds=0.2, most=100_000).why
    training = Training()
    monkeypatch.setattr(noise, "_free", lambda *_: 4.0 * FEATURES * 8 - 1)
    assert "free" in listen(training).why
    monkeypatch.setattr(noise, "_free", lambda *_: 4.0 * FEATURES * 8)
    assert not listen(Training()).why


def test_a_sparse_gradient_is_unknown() -> None:
    table = nn.Embedding(8, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        table(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()

    assert "sparse" in listen(table, step).why


def test_a_last_batch_of_an_epoch_is_left_out_of_the_windows() -> None:
    training, count = Training(16), iter(range(10_000))

    def step() -> None:
        training.batch = 1 if next(count) % 13 == 0 else 16
        training.step()

    found = listen(training, step, steps=MOST)
    training.batch = 16
    assert not found.why and found.scale.low < training.truth() < found.scale.high


def test_everything_is_taken_out_again() -> None:
    before = (torch.autograd.backward, nn.Module.__call__, torch.amp.GradScaler.update)
    assert not listen(Training()).why
    assert (torch.autograd.backward, nn.Module.__call__, torch.amp.GradScaler.update) == before


def test_steps_that_do_not_fit_are_not_begun() -> None:
    assert steps_within(6.0, 0.01) == MOST and steps_within(6.0, 0.1) == 48
    assert steps_within(6.0, 0.5) == 0 and steps_within(0.0, 0.1) == 0


# -- through the command line -----------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch.utils.data import DataLoader

torch.manual_seed(0)
x = torch.randn(20_000, 32)
y = x @ torch.full((32, 1), 0.2) + 3 * torch.randn(20_000, 1)
model = torch.nn.Linear(32, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
for epoch in range(1000):
    for rows in DataLoader(range(20_000), batch_size={batch}, shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
"""


@pytest.mark.parametrize(("batch", "speaks"), often([(2, True), (512, False)], (2, True)))
def test_diagnose_speaks_of_a_batch_of_two_and_not_of_one_of_512(
    write: Callable[[str, str], Path], batch: int, speaks: bool
) -> None:
    script = write("train.py", SCRIPT.format(batch=batch))
    options = ("--no-probe", "-q", "--seconds", "6s", "--json", "found.json")
    # Where other programs hold the cores few gradients are seen, and the low end of the scale may stay too low.
    for _ in range(3 if speaks else 1):
        ended = upshift("diagnose", *options, script.name, cwd=script.parent)
        assert ended.code == 0, ended.err
        m = read(script.parent / "found.json", Measurement)
        found = [item for item in diagnose(m) if item.rule == "batch_below_noise_scale"]
        if found:
            break
    assert m.facts.recipe is not None and m.facts.recipe.noise is not None
    heard = m.facts.recipe.noise
    assert not heard.why and heard.scale.low is not None
    assert bool(found) == speaks
    # The true scale of one weight is 1.6 (33 + 32 * 9 / 1.6 samples), give or take where the weights began.
    if speaks:
        assert f"A step takes {batch} samples" in found[0].evidence and found[0].techniques == ("larger_batch",)
        assert heard.scale.low * batch < 400
    else:
        assert heard.scale.high is not None and 50 < heard.scale.high * batch < 4 * 512
