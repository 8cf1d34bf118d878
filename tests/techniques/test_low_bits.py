"""Moments in 8 bits and linear layers in float8 (emulated on the CPU), against the same in full precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from upshift.sites import ModelSeen, NoEffect, Numerics, OptimizerSeen
from upshift.techniques.fp8 import Fp8, InFloat8, eligible
from upshift.techniques.low_bit_optimizer import In8Bits, LowBitOptimizer
from upshift.testing.contract import measurement

pytest.importorskip("torchao")


def built(kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    return model, kind(model.parameters(), **(options or {"lr": 1e-3}))


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, 64, generator=generator), torch.randint(0, 10, (256,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind, options", [(torch.optim.AdamW, {"lr": 1e-3}),
                                           (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})])  # fmt: skip
def test_moments_are_codes_between_steps_and_training_goes_as_well(kind, options):
    plain = train(*built(kind, **options), 30)
    model, optimizer = built(kind, **options)
    applied = LowBitOptimizer().at(OptimizerSeen(optimizer=optimizer), {})
    assert isinstance(applied, In8Bits)
    first = train(model, optimizer, 1)
    last = train(model, optimizer, 29)
    assert applied.effect() is None and abs(last - plain) < 0.05 * (first - plain)
    moments = [value for value in optimizer.state[model[0].weight].values() if type(value) is not torch.Tensor]
    assert len(moments) == (2 if kind is torch.optim.AdamW else 1) and moments[0].codes.dtype is torch.uint8
    # 8192 values a moment (the other weight has 1,280): three bytes of four, less a scale for each 256.
    assert applied.saved == len(moments) * (3 * 8192 - 4 * 8192 // 256)
    applied.close()
    assert all(type(value) is torch.Tensor for state in optimizer.state.values() for value in state.values())


def test_resumed_from_a_plain_state_dict_is_bitwise_the_same():
    model, optimizer = built()
    applied = LowBitOptimizer().at(OptimizerSeen(optimizer=optimizer), {})
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    assert all(type(value) is torch.Tensor for entry in state["state"].values() for value in entry.values())
    twin = copy.deepcopy(model)
    resumed = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    resumed.load_state_dict(state)
    again = LowBitOptimizer().at(OptimizerSeen(optimizer=resumed), {})
    assert train(model, optimizer, 3) == train(twin, resumed, 3)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    applied.close()
    again.close()


def test_what_is_too_small_or_foreign_is_left_alone():
    small = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert "4,096" in LowBitOptimizer().at(OptimizerSeen(optimizer=small), {}).reason
    assert LowBitOptimizer().numerics({}, measurement().facts) is Numerics.CHANGES_TRAINING


def test_float8_rounds_and_comes_off():
    model, _ = built()
    x = torch.randn(32, 64)
    exact = model(x).detach()
    layers = eligible(model, least=16)
    assert layers == [model[0]]  # ten outputs are no multiple of 16
    keys, plain = list(model.state_dict()), set(model[0].__dict__)
    applied = InFloat8(layers, emulate=True)
    rounded = model(x)
    error = float((rounded.detach() - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.1  # factors are off by up to 2^-4
    rounded.sum().backward()
    assert model[0].weight.grad is not None and list(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model)(x), exact)  # a copy is the script's own
    model.eval()
    assert torch.equal(model(x), exact)
    model.train()
    applied.switch(False)
    assert torch.equal(model(x), exact)
    applied.close()
    assert set(model[0].__dict__) == plain


def test_float8_declines_where_there_is_none():
    found = Fp8().at(ModelSeen(module=built()[0]), {})
    assert isinstance(found, NoEffect) and "cpu" in found.reason
    assert not Fp8().check(measurement()).applies
    assert Fp8().check(measurement(device="cuda:0")).applies
