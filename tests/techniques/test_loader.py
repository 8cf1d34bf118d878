"""The loader's arguments: only what may be changed is changed, and the batches stay the script's own."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from upshift.hardware import machine
from upshift.records import (
    Anatomy,
    LoaderFacts,
    Measurement,
    Phase,
    Quantity,
    ScriptFacts,
    unknown,
)
from upshift.sites import LoaderArgs, LoaderReady, NoEffect
from upshift.techniques import loader as module
from upshift.techniques.loader import Loader, Persistence, predict

DEFAULTS = {key: spec.default for key, spec in Loader.card.settings.items()}
SIGNATURE = inspect.signature(DataLoader.__init__)


def offer(args, main_guard=True, **changes):
    """Let the technique change bound arguments, as the hook does."""
    moment = LoaderArgs(args=args, main_guard=main_guard)
    return Loader().at(moment, {**DEFAULTS, **changes})


def build(dataset, changes, kind=DataLoader, **arguments):
    args = {"dataset": dataset, **arguments}
    applied = offer(args, **changes)
    assert not isinstance(applied, NoEffect), applied
    loader = kind(**args)
    kept = Loader().at(LoaderReady(loader=loader), {**DEFAULTS, **changes})
    return loader, kept


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)


def streams():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


class Plain(Dataset):
    def __init__(self, count=40):
        self.count, self.add, self.opened = count, 0.0, None

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if self.opened is None:
            self.opened = object()
        return torch.tensor([index + self.add]), index


class Augmented(Plain):
    def __getitem__(self, index):
        random.random(), np.random.rand()
        return torch.rand(1), index


def test_arguments_are_bound_by_the_stock_signature():
    assert {"num_workers", "prefetch_factor", "persistent_workers", "pin_memory"} <= set(SIGNATURE.parameters)


@pytest.mark.parametrize("order", ["plain", "shuffle", "batch_sampler"])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_of_a_dataset_without_random_numbers_are_the_same_bits(order, persistent):
    def arguments(data):
        if order == "batch_sampler":
            return {"batch_sampler": BatchSampler(SequentialSampler(data), 3, False)}
        return {"batch_size": 3, "shuffle": order == "shuffle"}

    def epochs(loader):
        torch.manual_seed(0)
        seen = []
        for _ in range(3):
            for x, index in loader:
                seen.append((x.tolist(), index.tolist()))
            seen.append(torch.rand(2).tolist())  # the script draws as well
        return seen, torch.get_rng_state().tolist()

    data = Plain()
    loader, kept = build(data, {"workers": 2, "persistent": persistent}, **arguments(data))
    assert loader.num_workers == 2 and loader.prefetch_factor == 2
    mine = epochs(loader)
    assert mine == epochs(DataLoader(data, **arguments(data)))
    if persistent:
        assert kept.kept == 2 and kept.effect() is None
        kept.close()


def test_nothing_is_drawn_and_nothing_is_left_open():
    data = Augmented()
    before = streams()
    build(data, {"workers": 1})
    assert streams() == before
    plain = Plain()
    build(plain, {"workers": 1})
    assert plain.opened is None  # a handle opened by the look at one sample would be shared by forked workers


def test_what_the_script_chose_stays():
    class Own(DataLoader):
        pass

    def initialise(_):
        return None

    def collate(batch):
        return default_collate(batch)

    data, generator = Plain(), torch.Generator()
    loader, _ = build(
        data, {"workers": 2, "prefetch": 3}, Own, generator=generator, worker_init_fn=initialise, collate_fn=collate
    )
    assert type(loader) is Own and loader.dataset is data and loader.generator is generator
    assert loader.worker_init_fn is initialise and loader.collate_fn is collate and loader.prefetch_factor == 3


def test_workers_can_be_taken_away():
    data = Plain()
    args = {
        "dataset": data,
        "num_workers": 4,
        "prefetch_factor": 8,
        "persistent_workers": True,
        "timeout": 5,
        "multiprocessing_context": "fork",
    }
    applied = offer(args, workers=0)
    assert "4 -> 0" in applied.note
    assert len(list(DataLoader(**args))) == 40
    fewer = {"dataset": data, "num_workers": 4}
    offer(fewer, workers=1)
    assert fewer["num_workers"] == 1


def test_more_workers_than_cores_are_cut():
    args = {"dataset": Plain()}
    assert "cores" in offer(args, workers=16).note
    assert args["num_workers"] == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))


class OnDevice(Plain):
    def __getitem__(self, index):
        return torch.empty(3, device="meta")


class Unreadable(Plain):
    def __getitem__(self, index):
        raise KeyError(index)


class Unsized:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"dataset": Stream()}, "double"),
        ({"dataset": Unsized()}, "no length"),
        ({"dataset": Plain(7)}, "too few"),
        ({"dataset": Plain(40), "batch_size": 10}, "too few"),
        ({"dataset": Plain(), "num_workers": 2}, "already"),
        ({"dataset": OnDevice()}, "accelerator"),
        ({"dataset": Unreadable()}, "KeyError"),
        ({"dataset": [lambda: 0] * 40, "multiprocessing_context": "spawn"}, "cannot be sent"),
    ],
)
def test_what_must_not_get_workers_keeps_its_arguments(args, why):
    before = dict(args)
    outcome = offer(args, workers=2)
    assert isinstance(outcome, NoEffect) and why in outcome.reason
    assert args == before


def test_spawn_needs_the_main_guard():
    args = {"dataset": Plain(), "multiprocessing_context": multiprocessing.get_context("spawn")}
    outcome = offer(args, main_guard=False)
    assert isinstance(outcome, NoEffect) and "__main__ guard" in outcome.reason
    assert not isinstance(offer(args, main_guard=True), NoEffect)


def test_the_room_is_forecast_and_the_refusal_has_the_numbers(monkeypatch):
    data = TensorDataset(torch.zeros(64, 2**18))  # 1 MiB a sample
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    outcome = offer({"dataset": data, "batch_size": 4}, workers=2, prefetch=4)
    # 2 workers x (4 ahead + 1 in the making) x 4 MiB
    assert isinstance(outcome, NoEffect) and "40 MiB of shared memory" in outcome.reason
    assert "64 MiB free" in outcome.reason
    monkeypatch.undo()
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(module, "memory_free", lambda: 100 * 2**20)
    outcome = offer({"dataset": data, "batch_size": 4}, workers=2, prefetch=4)
    assert isinstance(outcome, NoEffect) and "168 MiB" in outcome.reason and "100 MiB of memory" in outcome.reason


def test_pinning_is_for_cuda_only():
    args = {"dataset": Plain()}
    offer(args, workers=1, pin=True)
    assert ("pin_memory" in args) == torch.cuda.is_available()


def test_workers_are_kept_while_the_dataset_stays_and_renewed_when_it_changes():
    data = Plain(12)
    loader, kept = build(data, {"workers": 1, "persistent": True}, batch_size=3)
    assert isinstance(kept, Persistence) and loader.persistent_workers

    def pids():
        return [worker.pid for worker in loader._iterator._workers]

    def epoch():
        return torch.cat([x for x, _ in loader]).ravel()

    assert torch.equal(epoch(), torch.arange(12.0))
    first = pids()
    assert torch.equal(epoch(), torch.arange(12.0)) and pids() == first
    data.add = 100.0
    assert torch.equal(epoch(), torch.arange(12.0) + 100) and pids() != first
    assert kept.kept == 1 and kept.restarted == 1
    kept.close()
    assert not loader.persistent_workers and "_get_iterator" not in vars(loader)
    assert torch.equal(epoch(), torch.arange(12.0) + 100)


def test_kept_workers_serve_cut_passes_and_two_iterators_like_fresh_ones():
    data = Plain(12)
    loader, kept = build(data, {"workers": 1, "persistent": True}, batch_size=3)
    stored = pickle.loads(pickle.dumps(loader))
    next(iter(loader))
    pairs = [(a.tolist(), b.tolist()) for (_, a), (_, b) in zip(loader, loader, strict=True)]
    assert pairs == [([n, n + 1, n + 2],) * 2 for n in range(0, 12, 3)]
    assert kept.restarted == 2
    data.add = 5.0
    for other in (stored, copy.copy(loader)):
        assert len(list(other)) == 4
    kept.close()


def test_a_script_that_keeps_its_workers_itself_is_left_alone():
    loader = DataLoader(Plain(), num_workers=1, persistent_workers=True)
    outcome = Loader().at(LoaderReady(loader=loader), {**DEFAULTS, "persistent": True})
    assert isinstance(outcome, NoEffect)
    assert Loader().at(LoaderReady(loader=DataLoader(Plain())), {**DEFAULTS, "persistent": True}) is None


def quantity(value, unit="s"):
    return Quantity(value, unit) if value is not None else unknown(unit)


def measured(share, *loaders, device="cpu", cores=4):
    none = unknown("s")
    anatomy = Anatomy(
        step=quantity(1.0),
        phases=(Phase("data", quantity(share), quantity(share, "1")),),
        steps_seen=10, warmup_steps=1, warmup=none, startup=none, evaluation=none, checkpointing=none,
        micro_batches=quantity(1.0, "1"), samples=none,
    )  # fmt: skip
    facts = ScriptFacts(loaders=loaders, device=device, cores=cores)
    return Measurement(script="t.py", arguments=(), created="", anatomy=anatomy, facts=facts)


def facts(**changes):
    base = {"name": "l", "dataset": "D", "training": True, "workers": 0, "batch_size": 8, "samples": 8000}
    return LoaderFacts(**{**base, "iterable": False, **changes})


def test_the_verdict_follows_what_was_seen():
    technique = Loader()
    assert not technique.check(measured(0.5)).applies
    assert not technique.check(measured(0.5, facts(iterable=True))).applies
    assert not technique.check(measured(0.01, facts())).applies
    assert not technique.check(measured(0.5, facts(samples=16))).applies
    verdict = technique.check(measured(0.6, facts()))
    assert verdict.applies and 1.0 < verdict.gain <= 1 / 0.4 and verdict.rests_on
    assert {"workers": 4} in verdict.candidates and any("persistent" in item for item in verdict.candidates)
    assert technique.check(measured(None, facts())).gain is None
    fewer = technique.check(measured(0.0, facts(workers=32)))
    assert fewer.applies and fewer.candidates == ({"workers": 4},)
    for item in verdict.candidates:
        for key, value in item.items():
            assert not technique.card.settings[key].problem(value)


def test_the_prediction_is_bounded_by_overlap_and_by_the_cores():
    assert predict(0.5, 0, 1, 8, True) == pytest.approx(2.0)
    assert predict(0.9, 0, 1, 8, True) == pytest.approx(1 / 0.9)  # one worker reads no faster
    assert predict(0.5, 0, 2, 2, False) == pytest.approx(1 / 0.75)  # the reading still takes half of two cores
    assert predict(0.5, 2, 4, 8, True) == pytest.approx(2.0)
    assert predict(0.0, 0, 4, 8, False) == 1.0
