"""A run whose loss leaves the band of its plan: techniques come off one by one, most suspect first."""

from __future__ import annotations

import functools

import msgspec
import pytest
import torch
from watched import watched

from upshift.hook.guarded import LATE, RunController
from upshift.measure.band import band_of
from upshift.measure.steps import StepRecord
from upshift.records.runfold import fold
from upshift.sites import Card, Numerics
from upshift.sites.protocol import BaseApplied
from upshift.sites.runner import ChildSpec

STEPS = 300


class Acts(BaseApplied):
    note = ""

    def __init__(self, act):
        self.act, self.seen, self.closed = act, 0, False

    def before_step(self, optimizer):
        self.seen += 1
        self.act(self.seen, optimizer)

    def close(self):
        self.closed = True


class Planted:
    def __init__(self, name, act=lambda seen, optimizer: None):
        self.card = Card(name=name, summary="", source="", sites=("optimizer_created",), numerics=Numerics.ROUNDING,
                         switchable="live", targets=())  # fmt: skip
        self.act = act

    def at(self, moment, settings):
        return Acts(self.act)


def decays(seen, optimizer, begins=100):
    """The parameters shrink at every step from some step on: the model forgets."""
    if seen > begins:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.95)


def trained(steps=STEPS, micro=1, seed=0):
    """Train a small classifier; yields the loss of each step."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 4)).argmax(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(micro):
            i = torch.randint(0, 256, (32,))
            loss = torch.nn.functional.cross_entropy(model(x[i]), y[i]) / micro
            loss.backward()
            total += loss.item()
        optimizer.step()
        yield total / micro


@functools.cache
def band(micro=1):
    """The band of a run without techniques."""
    return msgspec.to_builtins(band_of(list(trained(micro=micro)))[0])


def guarded(tmp_path, monkeypatch, techniques, window=0.0, options=None):
    options = options or {"band": band()}
    monkeypatch.setattr(RunController, "window", window)
    names = [technique.card.name for technique in techniques]
    guard = {"no_band": "", "suspects": dict.fromkeys(names, "rounding"), **options}
    spec = ChildSpec(
        mode="run", target="train.py", plan={name: {} for name in names}, record=str(tmp_path), options={"guard": guard}
    )
    return watched(RunController(spec), [(technique, {}) for technique in techniques])


def told(tmp_path, capsys):
    """What the guard said, on stderr and in the log alike."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upshift: guard: ")]
    texts = [event.text for event in fold(tmp_path).events if event.kind in ("guard", "guarding")]
    assert [line.removeprefix("upshift: guard: ") for line in lines] == texts
    return texts


def off(tmp_path):
    return [event.text.partition(":")[0] for event in fold(tmp_path).events if event.kind == "off"]


def test_suspects_come_off_in_turn_until_the_loss_is_back(tmp_path, monkeypatch, capsys):
    with guarded(tmp_path, monkeypatch, [Planted("blamed"), Planted("guilty", decays), Planted("trusted")]) as run:
        losses = list(trained(600))
        assert run.stage.names == ("trusted",)
        run.finish(None)
    first, second, back = told(tmp_path, capsys)
    assert off(tmp_path) == ["blamed", "guilty"] and fold(tmp_path).guard_fired
    assert "blamed (rounding) came off, guilty and trusted stay" in first and "above the band" in first
    assert "still" in second and "guilty (rounding) came off, trusted stays" in second
    assert "back" in back and "since blamed and guilty came off" in back
    assert sum(losses[-50:]) < sum(losses[:50]) / 2


@pytest.mark.parametrize(("seed", "micro"), [(1, 1), (2, 1), (1, 3)])
def test_harmless_techniques_stay_with_any_seed(tmp_path, monkeypatch, capsys, seed, micro):
    with guarded(tmp_path, monkeypatch, [Planted("harmless")], 0.01, {"band": band(micro)}) as run:
        list(trained(STEPS + 60, micro, seed))
        assert run.stage.names == ("harmless",)
        run.finish(None)
    assert told(tmp_path, capsys) == []


def test_without_techniques_and_still_outside_it_was_not_the_plan(tmp_path, monkeypatch, capsys):
    lower = {**band(), "mean": [value - 5.0 for value in band()["mean"]]}
    with guarded(tmp_path, monkeypatch, [Planted("one"), Planted("other")], options={"band": lower}) as run:
        list(trained())
        assert run.stage.names == () and run.loss_guard.done
        run.finish(None)
    *_, last = told(tmp_path, capsys)
    assert off(tmp_path) == ["one", "other"] and "although the script runs untouched" in last
    assert fold(tmp_path).steps == STEPS


def test_end_before_the_loss_could_come_back_is_said(tmp_path, monkeypatch, capsys):
    with guarded(tmp_path, monkeypatch, [Planted("guilty", decays)]) as run:
        for _ in trained():
            if not run.stage.names:
                break
        run.finish(None)
    assert "ended before it was seen" in told(tmp_path, capsys)[-1]


def test_what_explodes_is_seen_before_the_window_of_the_record_is_over(tmp_path, monkeypatch):
    def explodes(seen, optimizer):
        if seen > 100:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.neg_()

    with guarded(tmp_path, monkeypatch, [Planted("guilty", explodes)], window=1e9) as run:
        at = next(t for t, _ in enumerate(trained()) if not run.stage.names)
        run.finish(None)
    assert 100 < at < 160


def test_another_model_in_the_same_process_is_another_training(tmp_path, monkeypatch, capsys):
    """Folds: the loss begins where it began."""
    with guarded(tmp_path, monkeypatch, [Planted("harmless")]) as run:
        for seed in range(3):
            list(trained(seed=seed))
        assert run.stage.names == ("harmless",)
        run.finish(None)
    assert told(tmp_path, capsys) == []


def test_plan_without_a_band_says_once_that_only_a_finite_loss_is_asked_for(tmp_path, monkeypatch, capsys):
    options = {"band": None, "no_band": "several optimizers: no single loss has to fall"}
    with guarded(tmp_path, monkeypatch, [Planted("guilty", decays)], options=options) as run:
        list(trained())
        assert run.stage.names == ("guilty",)
        run.finish(None)
    (text,) = told(tmp_path, capsys)
    assert text == f"only a loss that is not finite takes the techniques off: {options['no_band']}"
    assert not fold(tmp_path).guard_fired


def test_losses_of_an_accelerator_are_held_against_their_own_steps(tmp_path, monkeypatch, capsys):
    """They are read late; those from before the reaction do not count as what came of it."""
    losses, technique = list(trained(600)), Planted("guilty", decays)
    blank = dict.fromkeys(StepRecord._fields, 0.0)
    with guarded(tmp_path, monkeypatch, [technique]) as run:
        for t, value in enumerate(losses):
            hurt = t >= 150 and bool(run.stage.names)
            seen = torch.tensor(value + 2.0 * hurt)
            run.watch.index = t + 1
            run.on_step(StepRecord(**{**blank, "number": t, "losses": (seen,), "steps": 1, "timed": 1}))
        run.finish(None)
    alarm, back = told(tmp_path, capsys)
    step = int(alarm.split(":")[0].removeprefix("step "))
    assert 150 < step < 230 and "guilty (rounding) came off" in alarm and "back" in back
    # The last ones wait for more; everything else was read.
    assert len(run.late) == LATE
