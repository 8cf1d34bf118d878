"""Bit for bit the training without it, with dropout and batch normalisation, and fewer bytes saved for backward."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from upshift.sites import ModelSeen, NoEffect, Numerics
from upshift.techniques.activation_checkpointing import (
    ActivationCheckpointing,
    Checkpointed,
    dropped,
)
from upshift.testing.contract import measurement
from upshift.testing.seen import BLOCKS

SETTINGS = [{"scope": "blocks"}, {"scope": "selective"}, {"scope": "selective", "fraction": 1.0},
            {"scope": "selective", "fraction": 0.0}]  # fmt: skip


class Block(nn.Module):
    """Everything that a second run could get wrong: dropout, batch statistics, draws of Python and NumPy."""

    def __init__(self, norm: bool = True, draws: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
        self.up, self.down, self.drop = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.3)
        self.draws, self.act = draws, nn.ReLU(inplace=True) if in_place else nn.GELU()

    def forward(self, x, *, scale=1.0):
        if self.draws:
            scale = scale * (1 + random.random() + float(np.random.rand()))
        return x + self.drop(self.down(self.act(self.up(self.norm(x))))) * scale


class Net(nn.Module):
    def __init__(self, depth=4, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(depth))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def trained(settings, steps=4, **options):
    """Losses, final state, and the streams after it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Net(**options)
    applied = ActivationCheckpointing().at(ModelSeen(module=model), {"fraction": 0.5, **settings}) if settings else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y, losses = torch.randn(32, 16), torch.randint(0, 3, (32,)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses.append(float(model(x).sum()))
        model.train()
    streams = random.random(), np.random.rand(), float(torch.rand(()))
    return losses, model.state_dict(), streams, applied


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"norm": False, "in_place": True}], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_is_bitwise_the_same(settings, options):
    losses, state, streams, _ = trained({}, **options)
    found, found_state, found_streams, applied = trained(settings, **options)
    assert isinstance(applied, Checkpointed) and applied.effect() is None
    assert found == losses and found_streams == streams
    assert found_state.keys() == state.keys() and all(torch.equal(found_state[key], state[key]) for key in state)


def saved_bytes(model, x):
    """Bytes of distinct memory that autograd holds for the backward pass, parameters left out."""
    held = {}
    own = {item.untyped_storage().data_ptr() for item in model.parameters()}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    return sum(size for key, size in held.items() if key not in own), output


def test_fewer_bytes_are_held_and_switching_brings_them_back():
    torch.manual_seed(0)
    model, x = Net(8, norm=False, draws=False), torch.randn(256, 16)
    plain, _ = saved_bytes(model, x)
    applied = ActivationCheckpointing().at(ModelSeen(module=model), {"scope": "blocks", "fraction": 0.5})
    _, output = saved_bytes(model, x)
    blocks, output = saved_bytes(model, x)
    # A block keeps its input, of some 16 + 16 + 64 + 64 + 16 values a row.
    assert blocks < plain / 3
    output.sum().backward()
    applied.switch(False)
    assert saved_bytes(model, x)[0] == plain
    applied.close()
    assert saved_bytes(model, x)[0] == plain


def test_graph_that_is_kept_can_be_run_through_again():
    torch.manual_seed(0)
    model, x = Net(2, norm=True), torch.randn(8, 16)
    applied = ActivationCheckpointing().at(ModelSeen(module=model), {"scope": "blocks", "fraction": 0.5})
    loss = model(x).sum()
    first = torch.autograd.grad(loss, model.head.weight, retain_graph=True)
    gradients = torch.autograd.grad(loss, list(model.blocks.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.blocks.parameters()))
    assert all(map(torch.equal, gradients, again)) and first and applied.calls == 2
    assert int(model.blocks[0].norm.num_batches_tracked) == 1


def test_hooks_in_a_block_run_once():
    model, seen = Net(2, norm=False), []
    applied = ActivationCheckpointing().at(ModelSeen(module=model), {"scope": "blocks", "fraction": 0.5})
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 16)).sum().backward()
    assert len(seen) == 2 and "hooks" in applied.effect().reason


def test_cheapest_bytes_go_first():
    costs = {"mm": (10.0, 100), "gelu": (1.0, 100), "add": (0.1, 50), "view": (0.01, 0)}
    assert dropped(costs, 0.0) == set()
    assert dropped(costs, 0.5) == {"add"}  # gelu would go beyond the half
    assert dropped(costs, 0.6) == {"add", "gelu"}
    assert dropped(costs, 1.0) == {"add", "gelu", "mm"}


def test_models_it_declines():
    technique, settings = ActivationCheckpointing(), {"scope": "blocks", "fraction": 0.5}
    for module, why in (
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "no block"),
        (nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))).requires_grad_(False), "not trained"),
    ):
        found = technique.at(ModelSeen(module=module), settings)
        assert isinstance(found, NoEffect) and why in found.reason
    model = Net()
    model.gradient_checkpointing = True
    assert "itself" in technique.at(ModelSeen(module=model), settings).reason


def test_check():
    technique = ActivationCheckpointing()
    found = technique.check(measurement(models=(BLOCKS,)))
    assert found.applies and found.gain < 1.0 and "4 Block" in found.reason
    for facts in ({}, {"models": (BLOCKS,), "create_graph": True}, {"models": (BLOCKS,), "distributed": True}):
        assert not technique.check(measurement(**facts)).applies
    assert technique.numerics({}, measurement().facts) is Numerics.BITWISE
