"""Activations and optimizer state in host memory: the mechanics on the CPU, the real thing on CUDA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from upshift.sites import ModelSeen, NoEffect, OptimizerSeen
from upshift.techniques.activation_offload import ActivationOffload, Offloaded
from upshift.techniques.optimizer_offload import OptimizerOffload, StateOnHost
from upshift.testing.contract import measurement


def trained(device="cpu", activations=False, state=False, steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    applied = [Offloaded(model, least=1)] if activations else []
    kept = StateOnHost(optimizer, least=256) if state else None
    x = torch.randn(32, 16, device=device)
    for _ in range(steps):
        optimizer.zero_grad()
        output = applied[0].around(model, model, (x,), {}) if applied else model(x)
        output.square().mean().backward()
        optimizer.step()
    return model, optimizer, [*applied, *([kept] if kept else [])]


def same(model, other):
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("how", [{"activations": True}, {"state": True}], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_training_is_bitwise_the_same_and_something_moved(device, how):
    plain, _, _ = trained(device)
    model, optimizer, (applied,) = trained(device, **how)
    assert same(model, plain) and applied.effect() is None and applied.moved > 0
    applied.close()
    applied.close()
    for parameter, entry in optimizer.state.items():
        assert entry["exp_avg"].device == parameter.device


def test_state_dict_in_between_loads_in_plain_torch_and_switching_off_stops_moving():
    model, optimizer, (applied,) = trained(state=True)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    applied.switch(False)
    applied.moved = 0
    x = torch.randn(32, 16)
    for each, steps in ((model.eval(), optimizer), (twin.eval(), plain)):
        steps.zero_grad()
        each(x).sum().backward()
        steps.step()
    assert same(model, twin) and not applied.moved


@pytest.mark.cuda
def test_less_is_held_on_the_device():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8))).cuda()
    x = torch.randn(8192, 1024, device="cuda")

    def held(call):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        output = call()
        found = torch.cuda.memory_allocated() - before
        output.sum().backward()
        return found

    plain = held(lambda: model(x))
    applied = ActivationOffload().at(ModelSeen(module=model), {})
    assert held(lambda: applied.around(model, model, (x,), {})) < plain / 3


def test_on_the_cpu_both_decline_with_the_reason():
    model = nn.Linear(2, 2)
    for technique, moment in (
        (ActivationOffload(), ModelSeen(module=model)),
        (OptimizerOffload(), OptimizerSeen(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))),
    ):
        found = technique.at(moment, {})
        assert isinstance(found, NoEffect) and "host memory already" in found.reason
        assert "host memory already" in technique.check(measurement()).reason
