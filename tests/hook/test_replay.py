"""A batch replayed between two steps: nothing of it is left in the run, and it tells harm from rounding."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from watched import watched

from upshift.hook.livetrial import compared as judge
from upshift.hook.replay import CannotReplay, Recorder, replay
from upshift.sites import Card, ModelSeen, Numerics, OptimizerSeen
from upshift.sites.protocol import BaseApplied
from upshift.techniques.bf16 import Bf16
from upshift.techniques.channels_last import ChannelsLast
from upshift.techniques.fused import Fused


class Counting(nn.Module):
    """Batch statistics, dropout, a counter, a list, a buffer that is replaced: what a forward may leave behind."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 4, 3))
        self.head = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.log = 0, []

    def forward(self, x, scale=1.0):
        self.calls += 1
        self.log.append(random.random() + np.random.rand())
        self.seen = self.seen + 1
        return {"logits": self.head(self.body(x).mean((2, 3))) * scale, "extra": [x.sum()]}


def make(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Counting()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model, optimizer):
    optimizer.zero_grad()
    target = torch.randint(0, 3, (16,))
    for half in torch.randn(16, 3, 8, 8).chunk(2):
        out = model(half, scale=1.5)["logits"]
        nn.functional.cross_entropy(out, target[:8]).backward()
    torch.rand(1), random.random(), np.random.rand()  # so that the stream has moved on since the last call
    optimizer.step()


class Planted(BaseApplied):
    """Acts around the forward call, or before the step."""

    card = Card(name="planted", summary="", source="", sites=("model_created", "optimizer_created"),
                numerics=Numerics.ROUNDING, switchable="live", targets=())  # fmt: skip

    def __init__(self, forward=lambda out: out, gradients=lambda found: None):
        self.forward, self.gradients = forward, gradients

    def at(self, moment, settings):
        return self if isinstance(moment, (ModelSeen, OptimizerSeen)) else None

    def switch(self, on):
        pass

    def around(self, call, module, args, kwargs):
        out = call(*args, **kwargs)
        out["logits"] = self.forward(out["logits"])
        return out

    def before_step(self, optimizer):
        self.gradients([p.grad for group in optimizer.param_groups for p in group["params"]])


def compared(technique, settings=None, kind=Numerics.ROUNDING, replays=1):
    """Three steps, of which the last is recorded and replayed; then two more."""
    with watched() as run:
        model, optimizer = make()
        for _ in range(2):
            step(model, optimizer)
        stage, watch = run.stage, run.watch
        name = technique.card.name
        stage.add(technique, settings or {}, watch.past_moments())
        recorder = Recorder()
        stage.add(recorder, {}, watch.past_moments())
        stage.switch([recorder.card.name])
        watch.refresh()
        step(model, optimizer)
        stage.remove(recorder.card.name, "", quietly=True)
        stage.switch([])
        watch.refresh()
        for _ in range(replays):
            found = judge(watch, recorder.calls, (), name, kind, technique.card.precision)
        for _ in range(2):
            step(model, optimizer)
        assert [record.calls for record in run.records] == [2] * 5
        return found, model, optimizer


def test_the_run_goes_on_bit_for_bit_as_if_nothing_had_been_replayed():
    found, model, optimizer = compared(Planted(), kind=Numerics.BITWISE, replays=3)
    assert found == ("", 0.0, 0.0)
    ours_next = (torch.rand(3).tolist(), random.random(), np.random.rand())
    stock, stock_optimizer = make()
    for _ in range(5):
        step(stock, stock_optimizer)
    assert (model.calls, model.log) == (stock.calls, stock.log) and model.calls == 10
    ours, theirs = model.state_dict(), stock.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        for key, value in stock_optimizer.state[b].items():
            assert torch.equal(optimizer.state[a][key], value)
    assert ours_next == (torch.rand(3).tolist(), random.random(), np.random.rand())


@pytest.mark.parametrize(
    ("technique", "settings"),
    [(Fused(), {"kind": "fused"}), (Fused(), {"kind": "foreach"}), (Bf16(), {}), (ChannelsLast(), {})],
    ids=["fused", "foreach", "bf16", "channels_last"],
)
def test_honest_techniques_pass(technique, settings):
    found, _, _ = compared(technique, settings)
    assert found.reason == ""
    assert found.update < 0.1


def scaled(factor):
    return lambda found: [item.mul_(factor) for item in found]


FAULTS = {
    "gradients of half the size": Planted(gradients=scaled(0.5)),
    "2 % larger": Planted(gradients=scaled(1.02)),
    "the smallest bias turned": Planted(gradients=lambda found: found[-1].neg_()),
    "one layer without": Planted(gradients=lambda found: found[0].zero_()),
    "detached in part": Planted(forward=lambda out: torch.cat([out[:, :1], out[:, 1:].detach()], 1)),
    "output of another temperature": Planted(forward=lambda out: out * 1.01),
    "noise": Planted(forward=lambda out: out + 0.05 * torch.randn_like(out)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_harm_is_seen(fault):
    found, _, _ = compared(FAULTS[fault])
    assert found.reason


class NoDropout(Planted):
    """Evaluation mode for the dropout layer alone."""

    def around(self, call, module, args, kwargs):
        module.body[3].eval()
        try:
            return call(*args, **kwargs)
        finally:
            module.body[3].train()


def test_dropout_that_is_lost_is_seen():
    found, _, _ = compared(NoDropout())
    assert found.reason


def test_rounding_that_calls_itself_bitwise_is_seen():
    found, _, _ = compared(Planted(forward=lambda out: out * (1 + 1e-6)), kind=Numerics.BITWISE)
    assert found.reason


def test_a_step_with_a_closure_shows_nothing():
    with watched() as run:
        model, optimizer = nn.Linear(4, 1), None
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        recorder = Recorder()
        run.stage.add(recorder, {}, ())

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(3, 4)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CannotReplay, match="closure"):
            replay(run.watch, recorder.calls, (), ())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_interrupt_in_the_middle_leaves_the_run_as_it_was():
    def interrupted(found):
        scaled(0.0)(found)
        raise KeyboardInterrupt

    with watched() as run:
        model, optimizer = make()
        recorder, planted = Recorder(), Planted(gradients=interrupted)
        run.stage.add(recorder, {}, ())
        step(model, optimizer)
        run.stage.add(planted, {}, run.watch.past_moments())
        run.stage.switch([])
        before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], model.calls, model.log))
        with pytest.raises(KeyboardInterrupt):
            replay(run.watch, recorder.calls, (), ("planted",))
        assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), before[1], strict=True))
        assert (model.calls, model.log) == before[2:] and run.stage.steps_for(optimizer) == ()
        step(model, optimizer)
        assert [record.calls for record in run.records] == [2, 2]
