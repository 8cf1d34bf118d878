"""A run with techniques on: a loss that is not finite, and techniques that raise, cost at most one update."""

from __future__ import annotations

import copy
import io
import math
import sys

import pytest
import torch
from torch import nn
from watched import watched

from upshift.hook.guarded import RunController
from upshift.measure.steps import StepRecord
from upshift.records.runfold import fold
from upshift.sites import Card, ModelSeen, Numerics, OptimizerSeen
from upshift.sites.protocol import BaseApplied
from upshift.sites.runner import ChildSpec


class Around(BaseApplied):
    note = "around forward and step"

    def __init__(self, act):
        self.act, self.calls, self.steps, self.closed = act, 0, 0, False

    def around(self, call, module, args, kwargs):
        self.calls += 1
        return self.act(self, "forward", call(*args, **kwargs))

    def before_step(self, optimizer):
        self.steps += 1
        self.act(self, "step", None)

    def close(self):
        self.closed = True


class Planted:
    """A technique that does `act` around every forward and before every step."""

    card = Card(name="planted", summary="", source="", sites=("model_created", "optimizer_created"),
                numerics=Numerics.ROUNDING, switchable="live", targets=())  # fmt: skip

    def __init__(self, act):
        self.act, self.applied = act, []

    def at(self, moment, settings):
        if isinstance(moment, (ModelSeen, OptimizerSeen)):
            self.applied.append(Around(self.act))
            return self.applied[-1]
        return None


def guarded(tmp_path, technique):
    controller = RunController(ChildSpec(mode="run", target="train.py", plan={"planted": {}}, record=str(tmp_path)))
    return watched(controller, [(technique, {})])


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model


def one(model, optimizer, x=None, micro=1):
    optimizer.zero_grad()
    for _ in range(micro):
        loss = model(torch.ones(3, 4) if x is None else x).square().mean()
        loss.backward()
    optimizer.step()
    return loss.item()


def nan_at(call):
    return lambda applied, where, out: out * math.nan if where == "forward" and applied.calls == call else out


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.RMSprop(p),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("micro", [1, 3])
def test_update_after_a_bad_loss_is_skipped_and_the_rest_is_the_plain_path(tmp_path, capsys, make, micro):
    technique = Planted(nan_at(3 * micro + 1))
    with guarded(tmp_path, technique) as run:
        model = network()
        optimizer = make(model.parameters())
        for _ in range(3):
            assert math.isfinite(one(model, optimizer, micro=micro))
        before, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        one(model, optimizer, micro=micro)
        assert run.stage.names == () and all(item.closed for item in technique.applied)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        after = optimizer.state_dict()
        for key, values in state["state"].items():
            for name, value in values.items():
                assert value is None or torch.equal(torch.as_tensor(after["state"][key][name]), torch.as_tensor(value))
        # The script may look at the gradients it computed.
        assert not torch.isfinite(model[0].weight.grad).all()
        random = torch.get_rng_state()
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        losses = [one(model, optimizer) for _ in range(3)]
        run.finish(None)
    torch.set_rng_state(random)
    assert losses == [one(twin, twin_optimizer) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert "guard: step 4: the loss is nan" in capsys.readouterr().err
    record = fold(tmp_path)
    assert record.guard_fired and record.steps == 7
    assert any(event.kind == "off" and "planted" in event.text for event in record.events)


def test_both_updates_of_two_optimizers_are_skipped(tmp_path):
    technique = Planted(nan_at(2))
    with guarded(tmp_path, technique) as run:
        a, b = nn.Linear(4, 4), nn.Linear(4, 1)
        one_a, one_b = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=0.1)
        for i in range(3):
            before = copy.deepcopy([*a.parameters(), *b.parameters()])
            for optimizer in (one_a, one_b):
                one_a.zero_grad()
                one_b.zero_grad()
                b(a(torch.ones(2, 4))).mean().backward()
                optimizer.step()
            same = [torch.equal(x, y) for x, y in zip(before, [*a.parameters(), *b.parameters()], strict=True)]
            # The second call of `a` is in the first step, after its first update.
            assert any(same) is (i == 0)
        assert run.stage.names == ()


def test_infinite_loss_counts(tmp_path):
    bad = lambda applied, where, out: out * math.inf if where == "forward" and applied.calls == 2 else out  # noqa: E731
    with guarded(tmp_path, Planted(bad)) as run:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            one(model, optimizer, torch.ones(3, 4))
        assert run.stage.names == ()
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_without_techniques_a_bad_loss_is_the_scripts_own(tmp_path):
    controller = RunController(ChildSpec(mode="run", target="train.py", record=str(tmp_path)))
    with watched(controller) as run:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        one(model, optimizer, torch.full((3, 4), math.nan))
        run.finish(None)
    assert not torch.isfinite(model[0].weight).any()
    record = fold(tmp_path)
    assert not record.guard_fired and record.steps == 1 and record.windows[0].last_loss is None


def raises_at(where, call):
    def act(applied, place, out):
        if place == where and (applied.calls if where == "forward" else applied.steps) == call:
            raise RuntimeError("planted failure")
        return out

    return act


@pytest.mark.parametrize("where", ["forward", "step"])
@pytest.mark.parametrize("call", [1, 3])
def test_technique_that_raises_leaves_the_bits_of_the_plain_path(tmp_path, capsys, where, call):
    def trained():
        model = network(1)
        optimizer = torch.optim.Adam(model.parameters())
        return [one(model, optimizer) for _ in range(5)], model

    technique = Planted(raises_at(where, call))
    with guarded(tmp_path, technique) as run:
        losses, model = trained()
        assert run.stage.names == () and all(item.closed for item in technique.applied)
        run.finish(None)
    expected, plain = trained()
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert "planted failure" in capsys.readouterr().err
    record = fold(tmp_path)
    assert record.guard_fired and record.steps == 5


def test_error_of_the_script_itself_reaches_the_script(tmp_path):
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, x):
            raise KeyError("mine")

    with guarded(tmp_path, Planted(lambda applied, where, out: out)), pytest.raises(KeyError, match="mine"):
        Refuses()(torch.ones(1, 1))


def test_technique_that_fails_to_apply_is_off_and_the_others_stay(tmp_path, capsys):
    class Broken(Planted):
        def at(self, moment, settings):
            raise ValueError("cannot")

    with guarded(tmp_path, Broken(None)) as run:
        model = network()
        one(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert run.stage.names == ()
        run.finish(None)
    assert "off planted: ValueError: cannot" in capsys.readouterr().err


def test_closed_stderr_stops_nothing(tmp_path, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with guarded(tmp_path, Planted(nan_at(1))) as run:
        model = network()
        one(model, torch.optim.SGD(model.parameters(), lr=0.1))
        run.finish(None)
    assert fold(tmp_path).guard_fired


def test_full_disk_is_remembered_and_training_goes_on(tmp_path, capsys, monkeypatch):
    import os

    technique = Planted(lambda applied, where, out: out)
    with guarded(tmp_path, technique) as run:
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr(run.log, "_fd", full)
        monkeypatch.setattr(run.log, "_file", run.log._identity())
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = [one(model, optimizer) for _ in range(3)]
        run.finish(None)
    assert all(map(math.isfinite, losses))
    assert "the record is incomplete: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(("teachers", "seconds", "evaluation"), [(0, 0.5, 0.3), (10, 0.8, 0.0)])
def test_windows_hold_training_apart_from_evaluation_and_checkpoints(tmp_path, teachers, seconds, evaluation):
    """Work without gradients in every step is a teacher, and a part of training."""
    steps = StepRecord(**{**dict.fromkeys(StepRecord._fields, 0), "losses": (), "at": 1.0, "steps": 10, "total": 1.0,
                          "nograd": 0.3, "checkpoint": 0.2})  # fmt: skip
    with guarded(tmp_path, Planted(lambda applied, where, out: out)) as run:
        for _ in range(teachers):
            run.remarks.passes.timed.add(0.03, 32)
        run.on_step(steps)
        run.finish(None)
    window = fold(tmp_path).windows[0]
    assert (window.seconds, window.evaluation, window.checkpoint) == pytest.approx((seconds, evaluation, 0.2))
