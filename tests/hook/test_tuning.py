"""A run that tunes itself, in this process: what stays on is guarded, and nothing is left of the search."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from watched import watched

from upshift.hook import tuning
from upshift.hook.guarded import WINDOW
from upshift.hook.replay import Recorder
from upshift.hook.tuning import TuningController
from upshift.records.runfold import fold
from upshift.sites import Card, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied
from upshift.sites.runner import ChildSpec

NAP = 0.008


class Acts(BaseApplied):
    note = "no nap"

    def __init__(self, model, harms):
        self.model, self.harms = model, harms
        self.switch(True)

    def switch(self, on):
        self.model.nap = 0.0 if on else NAP

    def before_step(self, optimizer):
        if self.harms():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.neg_()

    def close(self):
        self.switch(False)


class Quick:
    """Takes a nap out of every forward; `harms` says when it begins to turn gradients round."""

    def __init__(self, model, *, kind=Numerics.BITWISE, tested_on=("cpu",), harms=lambda: False):
        self.card = Card(name="quick", summary="", source="", sites=("optimizer_created",), numerics=kind,
                         switchable="live", targets=("forward",), tested_on=tested_on)  # fmt: skip
        self.model, self.harms = model, harms

    def numerics(self, settings, facts):
        return self.card.numerics

    def check(self, seen):
        return Verdict(True, "planted")

    def at(self, moment, settings):
        return Acts(self.model, self.harms) if isinstance(moment, OptimizerSeen) else None


class Napping(nn.Sequential):
    nap = NAP

    def forward(self, x):
        time.sleep(self.nap)
        return super().forward(x)


@pytest.fixture
def planted(monkeypatch):
    """Makes these the only techniques there are."""

    def plant(*techniques):
        monkeypatch.setattr(tuning.registry, "all_techniques", lambda: techniques)
        known = {item.card.name: item for item in techniques}
        monkeypatch.setattr(
            tuning.registry, "in_order", lambda chosen: [(known[name], settings) for name, settings in chosen.items()]
        )

    return plant


def tuned(tmp_path):
    return TuningController(ChildSpec(mode="run", target="train.py", record=str(tmp_path), options={"tune": 60.0}))


def training():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 4)).argmax(1)
    model = Napping(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        i = torch.randint(0, 256, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()

    return model, step


def until(run, step, done, most=6000):
    """Train until something has come about."""
    for _ in range(most):
        if done():
            return
        step()
    raise AssertionError("it never came about")


def test_what_stays_on_comes_off_when_the_loss_rises(tmp_path, planted, capsys):
    harming = []
    with watched(tuned(tmp_path)) as run:
        model, step = training()
        planted(Quick(model, harms=lambda: bool(harming)))
        until(run, step, lambda: run.search is None)
        assert run.stage.acted == ("quick",) and run.watch.window == WINDOW
        run.watch.window = 0.05
        for _ in range(100):
            step()
        assert run.stage.acted == ("quick",)
        harming.append(True)
        until(run, step, lambda: not run.stage.names)
        assert model.nap == NAP
        run.finish(None)
    said = capsys.readouterr().err
    assert "quick stays on, guarded" in said and "risen far above its best" in said
    record = fold(tmp_path)
    assert record.guard_fired and record.techniques == {"quick": {}}


def test_nothing_is_left_of_a_search_that_kept_nothing(tmp_path, planted):
    before = (torch.manual_seed, len(optimizers._global_optimizer_pre_hooks))
    with watched(tuned(tmp_path)) as run:
        hooks = len(optimizers._global_optimizer_pre_hooks)
        model, step = training()
        planted(Quick(model, kind=Numerics.ROUNDING, harms=lambda: model.nap == 0.0))
        until(run, step, lambda: run.search is None)
        assert run.stage.names == () and model.nap == NAP
        assert run.watch.on_loss is None and run.watch.may_sleep and run.watch.window == WINDOW
        assert len(optimizers._global_optimizer_pre_hooks) == hooks and torch.manual_seed is before[0]
        run.finish(None)
    assert len(optimizers._global_optimizer_pre_hooks) == before[1]
    (event,) = [item.text for item in fold(tmp_path).events if "not kept quick" in item.text]
    assert ", but the" in event


@pytest.mark.parametrize("more", [{"tested_on": ("cuda",)}, {"kind": Numerics.RESEEDS}])
def test_what_was_never_run_here_or_changes_the_random_stream_is_not_tried(tmp_path, planted, capsys, more):
    with watched(tuned(tmp_path)) as run:
        model, step = training()
        planted(Quick(model, **more))
        until(run, step, lambda: run.search is None, most=40)
        assert run.stage.names == ()
        run.finish(None)
    assert "no live technique applies" in capsys.readouterr().err


def test_a_script_that_ends_before_the_tuning_is_said_and_recorded(tmp_path, capsys):
    with watched(tuned(tmp_path)) as run:
        _, step = training()
        for _ in range(5):
            step()
        run.finish(None)
    assert "the script ended first" in capsys.readouterr().err
    record = fold(tmp_path)
    assert record.steps == 5 and record.techniques == {} and record.status == "finished"


def test_an_error_of_the_script_in_a_recorded_call_is_its_own(tmp_path):
    with watched(tuned(tmp_path)) as run:
        model, _ = training()
        run.stage.add(Recorder(), {}, ())
        with pytest.raises(TypeError):
            model("no tensor")
        assert Recorder.card.name in run.stage.names
