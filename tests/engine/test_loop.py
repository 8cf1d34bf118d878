"""The loop against the loop a person would write."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from upshift import Job, Target, run
from upshift.engine.order import order
from upshift.errors import TrainingError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import tiny_jobs
from tiny_jobs import X, Y, full, plain, weighted


def by_hand(job: Job, loss=F.cross_entropy) -> torch.nn.Module:
    """The same training in plain torch: order, weights and seed as the job declares them."""
    torch.manual_seed(job.seed * 1_000_003)
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    for epoch in range(job.epochs):
        rows = order(320, job.seed, epoch)
        for start in range(0, 320, job.global_batch):
            chosen = rows[start : start + job.global_batch]
            value = loss(model(X[chosen]), Y[chosen])
            if isinstance(value, tuple):
                value = value[0] / value[1]
            value.backward()
            if job.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def far(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return max(float((x.double() - b.state_dict()[k].double()).abs().max()) for k, x in a.state_dict().items())


def test_it_is_bitwise_the_loop_written_by_hand():
    job = full.set(schedule=None, average=None)
    assert same(run(job).model, by_hand(job))


@pytest.mark.parametrize("micro", [1, 7, 16, 47])
def test_micro_batches_do_not_change_the_update(micro):
    assert far(run(plain, micro_batch=micro).model, by_hand(plain)) < 1e-5


@pytest.mark.parametrize("micro", [None, 5, 32])
def test_a_weighted_loss_is_normalised_over_the_whole_batch(micro):
    assert far(run(weighted, micro_batch=micro).model, by_hand(weighted, tiny_jobs.tokens)) < 1e-5


def test_dictionary_batches_reach_the_arguments_of_forward():
    class Keys(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_jobs.Net(dropout=0.0, norm=False)

        def forward(self, x):
            return self.net(x)

    data = {"x": X[:320], "y": Y[:320]}
    job = plain.set(model=Keys, train_data=data, loss=lambda out, batch: F.cross_entropy(out, batch["y"]))
    expected = by_hand(plain)
    found = run(job).model.net
    assert same(found, expected)


def test_evaluation_is_exact_and_uses_the_average():
    result = run(full)
    assert set(result.metrics) == {"accuracy", "loss"}
    model = result.model.eval()
    with torch.no_grad():
        raw = float((model(X[320:]).argmax(1) == Y[320:]).float().mean())
    assert result.metrics["accuracy"] != raw or result.metrics["loss"] > 0
    alone = run(full.set(average=None))
    model = alone.model.eval()
    with torch.no_grad():
        assert alone.metrics["accuracy"] == pytest.approx(float((model(X[320:]).argmax(1) == Y[320:]).float().mean()))
        assert alone.metrics["loss"] == pytest.approx(float(F.cross_entropy(model(X[320:]), Y[320:])), rel=1e-5)


def test_a_length_in_steps_ends_there_and_evaluates():
    result = run(full.set(steps=11))
    assert result.steps == 11 and result.samples == 11 * 48 - (48 - 320 % 48)
    assert "accuracy" in result.metrics


def test_the_target_ends_training_where_the_job_says_so():
    result = run(tiny_jobs.with_target)
    assert result.reached["step"] == result.steps < 50 * 7
    assert result.metrics["accuracy"] >= 0.5


def test_a_loss_that_is_not_finite_goes_back_and_leaves_the_batch_out(tmp_path):
    said: list[str] = []
    result = run(tiny_jobs.poisoned(at=8), out=tmp_path / "run", say=said.append)
    assert any("not finite" in text and "back to the last good state" in text for text in said)
    assert result.steps == full.epochs * 7 - 1
    assert all(math.isfinite(value) for value in result.metrics.values())
    memory = run(tiny_jobs.poisoned(at=8))
    assert same(memory.model, result.model), "without a folder the state is kept in memory"


def test_after_going_back_it_is_the_training_without_that_batch(tmp_path):
    found = run(tiny_jobs.poisoned(at=3, times=1).set(schedule=None, average=None, epochs=1)).model
    job = full.set(schedule=None, average=None)
    torch.manual_seed(job.seed * 1_000_003)
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    rows = order(320, job.seed, 0)
    for number, start in enumerate(range(0, 320, 48)):
        if number == 3:
            continue
        F.cross_entropy(model(X[rows[start : start + 48]]), Y[rows[start : start + 48]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same(found, model)


def test_a_loss_that_stays_not_finite_ends_in_an_error_that_names_samples():
    job = full.set(loss=lambda out, y: F.cross_entropy(out, y) * float("nan"))
    with pytest.raises(TrainingError, match="after going back 3 times"):
        run(job)


def test_out_of_memory_goes_on_with_smaller_micro_batches_and_the_same_update():
    tries = []

    class Small(tiny_jobs.Net):
        def forward(self, x):
            tries.append(len(x))
            if len(x) > 12:
                raise torch.OutOfMemoryError("planted")
            return super().forward(x)

    said: list[str] = []
    job = plain.set(model=partial(Small, dropout=0.0, norm=False))
    result = run(job, say=said.append)
    assert far(result.model, by_hand(plain)) < 1e-5
    assert max(tries[4:]) <= 12 and any("micro-batches of 12" in text for text in said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "already built"),
        ({"global_batch": 0}, "global_batch"),
        ({"epochs": 1, "steps": 5}, "both"),
        ({"target": Target("f1", 0.5)}, "no metric"),
        ({"eval_data": None, "target": Target("accuracy", 0.5)}, "nothing to evaluate"),
        ({"optimizer": torch.optim.SGD}, None),
        ({"clip": -1.0}, "clip"),
        ({"eval_data": None}, "metrics is given but nothing to evaluate on"),
        ({"eval_data": None, "metrics": {}, "eval_every": 5}, "eval_every is given"),
        ({"epoch": 3}, "no 'epoch'"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, words):
    if words is None:
        full.set(**change)
        return
    with pytest.raises(UsageError, match=words):
        full.set(**change)


def test_data_may_be_a_function_or_a_class_that_is_called():
    made = run(full.set(train_data=tiny_jobs.Augmented, epochs=1, schedule=None))
    assert same(made.model, run(full.set(train_data=tiny_jobs.Augmented(), epochs=1, schedule=None)).model)
    assert run(plain.set(train_data=lambda: (X[:320], Y[:320]), epochs=1)).steps == 7


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match="larger than the data"):
        run(full.set(global_batch=400))


def test_techniques_act_on_a_job_as_on_a_script():
    said: list[str] = []
    from upshift.engine.run import train_job
    from upshift.engine.settings import Execution

    job = plain.set(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    found = train_job(job, Execution(plan={"fused": {}}, say=said.append))
    assert any("applied fused" in text for text in said), said
    assert far(found.model, run(job).model) < 1e-4


@pytest.mark.parametrize("where", ["forward", "step"])
def test_a_technique_that_raises_comes_off_and_the_run_goes_on_as_without(where, monkeypatch):
    """Fault 23: the original is restored, and the rest is the unpatched training, dropout included."""
    from upshift.engine.run import train_job
    from upshift.engine.settings import Execution
    from upshift.sites import NoEffect
    from upshift.sites.protocol import BaseApplied, Card, Numerics
    from upshift.techniques import registry

    calls = [0]

    class Acting(BaseApplied):
        note = "acts"

        def around(self, call, module, args, kwargs):
            calls[0] += 1
            found = call(*args, **kwargs)
            if calls[0] == 5:
                raise ValueError("planted")
            return found

        def before_step(self, optimizer):
            calls[0] += 1
            if calls[0] == 5:
                raise ValueError("planted")

    class Raising:
        card = Card(name="raising", summary="", source="", sites=("model_created", "optimizer_created"),
                    numerics=Numerics.BITWISE, switchable="process", targets=())  # fmt: skip

        def at(self, moment, settings):
            wanted = "model_created" if where == "forward" else "optimizer_created"
            return Acting() if moment.site == wanted else NoEffect("not here")

    monkeypatch.setattr(registry, "in_order", lambda plan: [(Raising(), {})] if plan else [])
    said: list[str] = []
    found = train_job(full, Execution(plan={"raising": {}}, say=said.append))
    assert calls[0] == 5 and any("off raising: ValueError: planted" in text for text in said), said
    assert same(found.model, run(full).model) if where == "step" else found.steps == 28


def test_a_checkpoint_is_never_made_of_a_state_with_a_bad_loss(tmp_path):
    """Fault 14: what is saved was computed from finite losses only."""
    from upshift.checkpoint.store import Store

    run(tiny_jobs.poisoned(at=5), out=tmp_path / "run", save_steps=1)
    for item in Store(tmp_path / "run").checkpoints(verify=True):
        assert item.verified
        weights = Store(tmp_path / "run").load(item)[0]["model"]
        assert all(bool(torch.isfinite(value).all()) for value in weights.values() if value.is_floating_point())


def test_a_loss_that_explodes_goes_back_and_leaves_the_batches_out():
    def loss(output, target):
        found = F.cross_entropy(output, target)
        explodes = output.requires_grad and any(tiny_jobs._same(target, at) for at in (57, 58, 59))
        return found * 1e6 if explodes else found

    said: list[str] = []
    result = run(full.set(loss=loss, epochs=12, eval_data=None, metrics={}), say=said.append)
    assert any("within 3 steps; back to the last good state" in text for text in said), said
    assert result.steps == 12 * 7 - 3


def test_bad_samples_are_named_and_training_goes_on():
    class Broken(tiny_jobs.Augmented):
        def __getitem__(self, index):
            if index in (3, 77):
                raise OSError("planted")
            return super().__getitem__(index)

    said: list[str] = []
    result = run(full.set(train_data=Broken(), epochs=2, schedule=None), say=said.append)
    assert result.steps == 14 and any("77" in text for text in said) and any("planted" in text for text in said)


def test_early_stopping_ends_and_keeps_the_best(tmp_path):
    from upshift.checkpoint.store import Store
    from upshift.engine.stopping import EarlyStop

    said: list[str] = []
    job = full.set(stop_early=EarlyStop("loss", patience=2), epochs=60, schedule=None,
                   optimizer=partial(torch.optim.AdamW, lr=0.3))  # fmt: skip
    result = run(job, out=tmp_path / "run", say=said.append)
    assert result.steps < 60 * 7 and any("has not become better" in text for text in said)
    best = [item for item in Store(tmp_path / "run").checkpoints(verify=True) if item.best]
    assert best and best[-1].facts["metrics"]["loss"] == result.best["loss"]
    again = run(job, out=tmp_path / "run")
    assert again.steps == result.steps, "a run that stopped early is done"


@pytest.mark.parametrize("name", ["sgd", "muon", "lamb", "schedule_free_adamw"])
def test_optimizers_by_name(name):
    if name in ("lamb", "schedule_free_adamw"):
        pytest.importorskip("pytorch_optimizer")
    from upshift.engine.optimizers import optimizer

    job = full.set(optimizer=optimizer(name, lr=1e-2), schedule=None, average=None)
    assert run(job).metrics["loss"] < 2.0


def test_wild_samples_in_a_small_loss_are_no_spike():
    wild = Y[:320].float().clone()
    wild[[3, 90, 200]] += 1e4
    job = plain.set(train_data=(X[:320], wild), model=partial(torch.nn.Linear, 12, 1), epochs=40, clip=0.01,
                    loss=lambda out, y: F.mse_loss(out.squeeze(1), y), global_batch=4)  # fmt: skip
    said: list[str] = []
    assert run(job, say=said.append).steps == 40 * 80
    assert not said


def test_the_time_of_a_run_counts_once_after_going_back(tmp_path):
    began = time.perf_counter()
    result = run(tiny_jobs.poisoned(at=20), out=tmp_path / "run")
    assert result.seconds <= time.perf_counter() - began


def test_a_technique_that_acts_on_the_loss_acts_on_that_of_a_job():
    from upshift.engine.run import train_job
    from upshift.engine.settings import Execution

    found = train_job(plain, Execution(plan={"label_smoothing": {"smoothing": 0.1}}))
    assert far(found.model, by_hand(plain, partial(F.cross_entropy, label_smoothing=0.1))) < 1e-6
    assert far(found.model, by_hand(plain)) > 1e-3
