"""One step seen operation by operation: memory and work against what can be reckoned, and against other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from upshift.advise import memory
from upshift.hook.activations import StepObserver
from upshift.records.stepwork import StepWork


def watched(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any], batch: int | None) -> StepWork:
    step()
    observer = StepObserver([model], [optimizer], batch)
    assert observer.start()
    step()
    assert not observer.step_ended()
    step()
    assert observer.step_ended() and not observer.running
    found = observer.found()
    assert found is not None and not found.note
    return found


def mlp(batch: int, width: int = 96, optimizer: Any = torch.optim.Adam) -> StepWork:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, width), nn.ReLU(), nn.Linear(width, 8))
    stepped = optimizer(model.parameters(), lr=0.01)

    def step() -> None:
        x = torch.randn(batch, 40)
        stepped.zero_grad()
        model(x).square().mean().backward()
        stepped.step()

    return watched(model, stepped, step, batch)


PARAMETERS = 40 * 96 + 96 + 96 * 8 + 8


def test_what_stays_is_exact() -> None:
    found = mlp(64)
    assert found.parameters == found.gradients == 4 * PARAMETERS
    # Two moments of every parameter, and a step counter of each of four tensors.
    assert found.optimizer_state == 8 * PARAMETERS + 4 * 4
    assert found.trained == PARAMETERS and found.buffers == 0 and found.passes == 1
    assert found.device == "cpu" and found.batch == 64


def test_activations_by_hand() -> None:
    # At the beginning of the backward pass: the samples, the result of ReLU (its input is gone), the output (of which
    # the square's gradient is made).
    assert mlp(64).saved == 4 * 64 * (40 + 96 + 8)


def test_what_autograd_saves_is_held() -> None:
    batch, kept = 32, 0
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(5))
    x, y = torch.randn(batch, 3, 16, 16), torch.randint(5, (batch,))
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    weights = {item.untyped_storage().data_ptr() for item in model.parameters()}
    kept = sum(size for place, size in seen.items() if place not in weights)
    loss.backward()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    found = watched(model, optimizer, step, batch)
    assert found.saved is not None
    assert kept * 0.98 <= found.saved <= kept * 1.1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("batch", [8, 512])
def test_other_samples_are_predicted(optimizer: Any, batch: int) -> None:
    predicted = memory.predict(mlp(64, optimizer=optimizer), batch=batch).total.value
    assert predicted == pytest.approx(memory.predict(mlp(batch, optimizer=optimizer)).total.or_else(0), rel=0.03)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 128), nn.Linear(128, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h + self.down(F.gelu(self.up(h))))


def attending(batch: int, autocast: bool) -> StepWork:
    model = Attending()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randint(100, (batch, 48))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()

    return watched(model, optimizer, step, batch)


def test_attention_at_other_samples() -> None:
    predicted = memory.predict(attending(4, False), batch=32).total.value
    assert predicted == pytest.approx(memory.predict(attending(32, False)).total.or_else(0), rel=0.05)


def test_autocast_is_predicted_by_its_rules() -> None:
    plain, lower = attending(16, False), attending(16, True)
    predicted = memory.predict(plain, precision="bf16").total.or_else(0)
    measured = memory.predict(lower, autocast=True).total.or_else(0)
    unchanged = memory.predict(plain).total.or_else(0)
    assert measured < 0.9 * unchanged  # else there is nothing to predict
    assert predicted == pytest.approx(measured, rel=0.2)


def test_work_is_counted() -> None:
    found = mlp(64)
    products = [row for row in found.ops if row.product]
    # Forward: two products; backward: two for each weight but the first, whose input needs no gradient.
    forward = 2 * 64 * (40 * 96 + 96 * 8)
    assert sum(row.scaled_flops for row in products if row.phase == "forward") == forward
    assert sum(row.scaled_flops for row in products if row.phase == "backward") == 2 * forward - 2 * 64 * 40 * 96
    optimizer = [row for row in found.ops if row.phase == "optimizer"]
    assert optimizer and sum(row.scaled_bytes for row in optimizer) == 0
    assert sum(row.fixed_bytes for row in optimizer) > 8 * PARAMETERS
    assert all(row.seconds is not None and row.seconds >= 0 and row.calls > 0 for row in found.ops)


def test_a_dry_run_on_meta_tensors_counts_the_same_products() -> None:
    def products(found: StepWork) -> float:
        return sum(row.scaled_flops + row.fixed_flops for row in found.ops if row.product)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 8))
        x = torch.randn(64, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    found = watched(model, optimizer, step, 64)
    assert products(found) == products(mlp(64))
    assert found.device == "meta" and found.parameters == 4 * PARAMETERS
    assert all(row.seconds is None for row in found.ops)


def test_the_training_is_the_same() -> None:
    def trained(look: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        observer = StepObserver([model], [optimizer], 4)
        for number in range(5):
            if look and number == 1:
                assert observer.start()
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            observer.step_ended()
        return [item.detach().clone() for item in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_it_does_not_look_under_another_mode() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = nn.Linear(2, 2)
    observer = StepObserver([model], [torch.optim.SGD(model.parameters(), lr=0.1)], 1)
    with Other():
        assert not observer.start()
    assert observer.found() is None and not observer.running


def test_nothing_of_it_stays() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    model = nn.Linear(2, 2)
    observer = StepObserver([model], [torch.optim.SGD(model.parameters(), lr=0.1)], None)
    assert observer.start()
    observer.stop()
    assert _get_current_dispatch_mode_stack() == [] and observer.found() is None
