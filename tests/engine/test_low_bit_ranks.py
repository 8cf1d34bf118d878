"""States of few bits on two ranks: what is resumed is what was there, bit for bit; sharded ones are declined."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import ranked
import torch

from upshift.engine.group import Group
from upshift.engine.lowbit import store_plainly
from upshift.engine.plainstate import load_model_state, load_optimizer_state, model_state, optimizer_state
from upshift.errors import UsageError


def test_a_rate_in_a_tensor_is_stored_as_its_number_and_comes_back_as_a_tensor() -> None:
    def made() -> torch.optim.Optimizer:
        # torchao's optimizers keep it like this.
        return store_plainly(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1)))

    first, second = made(), made()
    first.param_groups[0]["lr"].fill_(0.025)
    state = first.state_dict()
    assert state["param_groups"][0]["lr"] == float(torch.tensor(0.025))
    second.load_state_dict(state)
    assert torch.equal(second.param_groups[0]["lr"], torch.tensor(0.025))
    # What was stored with the tensor itself loads as well.
    state["param_groups"][0]["lr"] = torch.tensor(0.5)
    second.load_state_dict(state)
    assert torch.equal(second.param_groups[0]["lr"], torch.tensor(0.5))


def _resumed(names: list[str]) -> Any:
    # What is computed is the same without a compiler.
    torch.compile = lambda function, **settings: function  # type: ignore[assignment]
    with Group.here(device="cpu") as group:
        return [[*_through(group, name), _sharded(group, name)] for name in names]


def _through(group: Any, name: str) -> list[Any]:
    """Weights after six steps without a break, and after three, a checkpoint and three; whether moments have few
    bits."""
    from upshift.engine.optimizers import optimizer

    def made() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 4))
        module = group.wrap(model, "ddp")
        return model, module, optimizer(name, lr=0.01)(model.parameters())

    def train(model: Any, module: Any, built: Any, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(2 * step + group.rank)  # also of what rounding draws
            with group.no_sync(last=True):
                module(torch.randn(8, 64)).square().mean().backward()
            group.reduce_gradients(model.parameters())
            torch.manual_seed(step)
            built.step()
            built.zero_grad()

    whole = made()
    train(*whole, 0, 6)
    model, module, built = made()
    train(model, module, built, 0, 3)
    kept = {key: value.clone() for key, value in model_state(module).items()}
    state = optimizer_state(module, built)
    model, module, built = made()
    load_model_state(module, kept)
    load_optimizer_state(module, built, state)
    low = type(built.state[model[0].weight]["exp_avg"]).__name__
    train(model, module, built, 3, 6)
    return [_digest(whole[0]), _digest(model), low]


def _sharded(group: Any, name: str) -> str:
    from upshift.engine.optimizers import optimizer

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 4))
    group.wrap(model, "fsdp2")
    try:
        optimizer(name, lr=0.01)(model.parameters())
    except UsageError as error:
        return str(error)
    return ""


def _digest(model: Any) -> str:
    return hashlib.sha256(b"".join(item.detach().numpy().tobytes() for item in model.parameters())).hexdigest()


@pytest.mark.extra
def test_two_ranks_resume_with_states_of_few_bits(tmp_path: Any) -> None:
    pytest.importorskip("torchao")
    first, second = ranked.run(2, _resumed, ["adamw_8bit", "adam_4bit", "adamw_fp8"], folder=tmp_path)
    for one, other in zip(first, second, strict=True):
        assert one == other  # the ranks hold the same
        whole, resumed, low, declined = one
        assert whole == resumed
        assert low.startswith("OptimState")
        assert "not sharded" in declined and "ddp" in declined
