"""The sample cache: the stock loader's bits and random streams, and refusal where they cannot be had."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from upshift.records import Anatomy, LoaderFacts, Measurement, Phase, Quantity, ScriptFacts, unknown
from upshift.sites import LoaderReady, NoEffect
from upshift.techniques.cache import Cache, CacheApplied

DEFAULTS = {key: spec.default for key, spec in Cache.card.settings.items()}
Point = namedtuple("Point", ["x", "label"])


class Hidden:
    """A value no fingerprint can see: the datasets below change behind the cache's back through it."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Made(Dataset):
    """Samples made by a function of the index."""

    def __init__(self, make, count):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.make(index)


def cached(loader, folder, **changes):
    applied = Cache().at(LoaderReady(loader=loader, scratch=str(folder)), {**DEFAULTS, **changes})
    assert isinstance(applied, CacheApplied), applied
    return applied


def refused(loader, folder, **changes):
    outcome = Cache().at(LoaderReady(loader=loader, scratch=str(folder)), {**DEFAULTS, **changes})
    assert isinstance(outcome, NoEffect)
    assert not list(Path(folder).iterdir())
    assert "_get_iterator" not in vars(loader)
    return outcome.reason


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def identical(first, second):
    """Same containers, and tensors with the same dtype, shape, strides and bits."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape, first.stride()) == (second.dtype, second.shape, second.stride())
        assert raw(first) == raw(second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            identical(first[key], second[key])
    else:
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            identical(one, other)


def streams():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def reseed(seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def leaf(kind, index):
    base = torch.sin(torch.arange(6, dtype=torch.float64) * (index + 1)).reshape(2, 3)
    return {
        "f32": lambda: base.float(),
        "f64": lambda: base,
        "bf16": lambda: base.bfloat16(),
        "u8": lambda: (base.abs() * 255).to(torch.uint8),
        "bool": lambda: base > 0,
        "c64": lambda: torch.complex(base.float(), -base.float()),
        "special": lambda: torch.tensor([float("nan"), -0.0, float("inf"), index]),
        "scalar": lambda: base[0, 0].float(),
        "numpy": lambda: base.numpy().astype(np.float32),
        "np16": lambda: np.arange(3, dtype=np.int16) * index,
        "np32": lambda: np.float32(index / 3),
        "np64": lambda: np.int64(index),
        "int": lambda: index * 7,
        "float": lambda: index / 3,
        "truth": lambda: index % 3 == 0,
        "hwc": lambda: torch.arange(24.0).reshape(2, 4, 3).permute(2, 0, 1) * index,
    }[kind]()


LEAVES = st.sampled_from(
    ["f32", "f64", "bf16", "u8", "bool", "c64", "special", "scalar", "numpy", "np16", "np32", "np64", "int", "float"]
    + ["truth", "hwc"]
)
FORMS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["tuple", "list"]), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["dict", "ordered"]), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("point"), st.lists(inner, min_size=2, max_size=2)),
    ),
    max_leaves=4,
)


def sample(form, index):
    if isinstance(form, str):
        return leaf(form, index)
    parts = [sample(part, index) for part in form[1]]
    if form[0] == "point":
        return Point(*parts)
    if form[0] in ("dict", "ordered"):
        kind = dict if form[0] == "dict" else OrderedDict
        return kind((f"k{place}", part) for place, part in enumerate(parts))
    return tuple(parts) if form[0] == "tuple" else parts


def sampler_for(kind, dataset):
    if kind == "weighted":
        return {"sampler": WeightedRandomSampler(torch.arange(1.0, len(dataset) + 1), len(dataset) + 3)}
    if kind == "batch":
        return {"batch_sampler": BatchSampler(RandomSampler(dataset), 3, True)}
    if kind == "generator":
        return {"shuffle": True, "generator": torch.Generator().manual_seed(5)}
    return {"shuffle": kind == "shuffle"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=FORMS,
    count=st.integers(1, 40),
    batch=st.integers(1, 17),
    drop=st.booleans(),
    order=st.sampled_from(["plain", "shuffle", "weighted", "batch", "generator"]),
)
def test_three_epochs_are_the_same_bits_and_leave_the_same_random_streams(tmp_path, form, count, batch, drop, order):
    def build(dataset):
        extra = sampler_for(order, dataset)
        if order != "batch":
            extra.update(batch_size=batch, drop_last=drop)
        return DataLoader(dataset, **extra)

    def epochs(loader):
        reseed()
        for _ in range(3):
            yield [copy.deepcopy(item) for item in loader]
            torch.rand(3)  # the script draws too
            yield streams()

    stock = list(epochs(build(Made(lambda index: sample(form, index), count))))
    reseed()
    loader = build(Made(lambda index: sample(form, index), count))
    applied = cached(loader, tmp_path)
    mine = list(epochs(loader))
    for one, other in zip(mine[::2], stock[::2], strict=True):
        identical(one, other)
    assert mine[1::2] == stock[1::2]
    assert not applied.problem and not applied.store.reason
    if order in ("plain", "shuffle", "generator") and stock[0]:
        assert applied.store.served > 0 and applied.effect() is None
        assert applied.store.compared >= 0.01 * applied.store.served
    applied.close()
    assert not list(tmp_path.iterdir())


def test_the_proof_leaves_every_random_stream_where_it_was(tmp_path):
    reseed(3)
    before = streams()
    loader = DataLoader(Made(lambda index: (torch.full((3,), float(index)), index), 30), batch_size=4)
    applied = cached(loader, tmp_path)
    assert streams() == before
    own = np.random.default_rng(0)

    class Own(Made):
        def __init__(self):
            super().__init__(None, 20)
            self.rng = own

        def __getitem__(self, index):
            return torch.tensor(self.rng.random())

    state = own.bit_generator.state
    assert "draws from" in refused(DataLoader(Own()), tmp_path)
    assert own.bit_generator.state == state and streams() == before
    applied.close()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda index: torch.rand(3), "draws from torch"),
        (lambda index: torch.tensor(np.random.rand()), "draws from numpy"),
        (lambda index: random.random(), "draws from Python"),
        (lambda index: (random.random(), torch.ones(2))[1], "draws from Python"),  # consumed, not used
        (lambda index: np.random.default_rng().random(3), "gave two results"),
        (lambda index: torch.ones(index % 3 + 1), "RuntimeError"),
        (lambda index: "text", "text"),
        (lambda index: {"name": str(index), "x": 1.0}, "text"),
        (lambda index: torch.ones(2, requires_grad=True), "gradient"),
        (lambda index: torch.ones(0), "empty"),
        (lambda index: 1 / 0, "ZeroDivisionError"),
        (lambda index: None, "NoneType"),
        (lambda index: (), "no data"),
        (lambda index: index if index else 1.0, "differ"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_the_reason(tmp_path, make, why):
    reseed(1)
    before = streams()
    assert why in refused(DataLoader(Made(make, 30), batch_size=4), tmp_path)
    assert streams() == before


def test_refuses_loaders_it_cannot_serve(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    data = TensorDataset(torch.arange(10.0))
    assert "map" in refused(DataLoader(Stream()), tmp_path)
    assert "worker" in refused(DataLoader(data, num_workers=1), tmp_path)
    assert "collate" in refused(DataLoader(data, collate_fn=lambda batch: default_collate(batch)), tmp_path)
    assert "batch_size=None" in refused(DataLoader(data, batch_size=None), tmp_path)
    reason = refused(DataLoader(TensorDataset(torch.ones(100, 1000))), tmp_path, max_bytes=1000)
    assert "391 KiB" in reason and "100 samples" in reason


def test_a_counter_in_the_dataset_is_refused_and_put_back(tmp_path):
    class Counts(Made):
        seen = 0

        def __getitem__(self, index):
            self.seen += 1
            return self.make(index)

    data = Counts(lambda index: index, 20)
    data.seen = 0
    assert "seen" in refused(DataLoader(data), tmp_path)
    assert data.seen == 0


def test_one_buffer_handed_out_again_and_again_is_refused(tmp_path):
    buffer = Hidden(torch.zeros(3))
    data = Made(lambda index: buffer.value.fill_(index), 20)
    assert "two results" in refused(DataLoader(data, batch_size=4), tmp_path)


def unproven(count, folder):
    """An index that the proof does not read."""
    seen = Hidden(set())

    def make(index):
        seen.value.add(index)
        return torch.ones(1)

    cached(DataLoader(Made(make, count)), folder).close()
    return next(index for index in range(count) if index not in seen.value)


def test_a_dataset_that_changes_unseen_is_caught_and_the_batch_is_right(tmp_path):
    added = Hidden(0.0)
    loader = DataLoader(Made(lambda index: torch.full((2,), index + added.value), 64), batch_size=8)
    applied = cached(loader, tmp_path)
    list(loader)
    added.value = 100.0
    second = torch.cat(list(loader))
    assert "was not what had been kept" in applied.problem
    assert torch.equal(second[:, 0], torch.arange(64.0) + 100)  # the first batch already was re-read in part
    assert isinstance(applied.effect(), NoEffect)


@pytest.mark.parametrize("random_numbers", ["global", "fresh"])
def test_a_dataset_that_becomes_random_is_dropped_and_marked(tmp_path, random_numbers):
    on = Hidden(False)

    def make(index):
        if not on.value:
            return torch.ones(1)
        return torch.rand(1) if random_numbers == "global" else torch.tensor(np.random.default_rng().random(1)).float()

    loader = DataLoader(Made(make, 64), batch_size=8)
    applied = cached(loader, tmp_path)
    list(loader)
    on.value = True
    list(loader)
    assert applied.problem == applied.store.reason != ""
    assert applied.store.rows is None


def test_random_numbers_drawn_for_one_sample_only_end_the_cache_without_harm(tmp_path):
    rare = unproven(400, tmp_path)

    def build():
        return DataLoader(
            Made(lambda index: torch.rand(1) if index == rare else torch.ones(1), 400), batch_size=16, shuffle=True
        )

    loader = build()
    reseed()
    expected = [torch.cat(list(loader)) for _ in range(2)]
    end = streams()
    loader = build()
    applied = cached(loader, tmp_path)
    reseed()
    mine = [torch.cat(list(loader)) for _ in range(2)]
    assert all(map(torch.equal, mine, expected)) and streams() == end
    assert "drew from torch" in applied.store.reason and not applied.problem


def test_changes_of_the_dataset_end_the_cache_before_anything_wrong_is_served(tmp_path):
    class Scaled(Made):
        def __init__(self, *args):
            super().__init__(*args)
            self.epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __getitem__(self, index):
            return torch.tensor([index + 1000.0 * self.epoch])

    data = Scaled(None, 20)
    loader = DataLoader(data, batch_size=4)
    applied = cached(loader, tmp_path)
    list(loader)
    data.set_epoch(1)
    assert torch.equal(torch.cat(list(loader)).ravel(), torch.arange(20.0) + 1000)
    assert "epoch" in applied.store.reason and not applied.problem

    data = Scaled(None, 20)
    loader = DataLoader(Subset(data, range(2, 18)), batch_size=4)
    applied = cached(loader, tmp_path)
    list(loader)
    batches = iter(loader)
    next(batches)
    data.set_epoch(2)  # in the middle of an epoch, below a Subset
    assert next(batches).ravel().tolist() == [2006.0, 2007.0, 2008.0, 2009.0]
    assert not applied.problem


@pytest.mark.parametrize("change", ["tensor", "array", "transform", "subset", "closure"])
def test_changes_deep_inside_the_dataset_are_seen_between_epochs(tmp_path, change):
    class Scale:
        def __init__(self):
            self.by = torch.ones(1)

        def __call__(self, x):
            return x * self.by

    class Data(Made):
        def __init__(self):
            factor = 1.0
            self.items, self.other, self.steps = torch.arange(16.0), np.ones(16), [Scale()]

            def closure(x):
                return x * factor

            def alter():
                nonlocal factor
                factor = 2.0

            self.closure, self._alter = closure, [alter]

        def __len__(self):
            return 16

        def __getitem__(self, index):
            return self.closure(self.steps[0](self.items[index] * float(self.other[index])))

    data = Data()
    view = Subset(data, list(range(12)))

    def alter():
        if change == "tensor":
            data.items[3] = 9.0
        elif change == "array":
            data.other[3] = 9.0
        elif change == "transform":
            data.steps[0].by = torch.full((1,), 3.0)
        elif change == "subset":
            view.indices[3] = 15
        else:
            data._alter[0]()

    loader = DataLoader(view, batch_size=4)
    applied = cached(loader, tmp_path)
    list(loader)
    list(loader)
    assert applied.store.served == 12
    alter()
    expected = default_collate([view[index] for index in range(12)])
    assert torch.equal(torch.cat(list(loader)), expected)
    assert "changed between epochs" in applied.store.reason and applied.store.served == 12


def test_a_batch_is_memory_of_its_own(tmp_path):
    loader = DataLoader(TensorDataset(torch.arange(20.0).reshape(10, 2)), batch_size=4)
    applied = cached(loader, tmp_path)
    for _ in range(3):
        for place, (batch,) in enumerate(loader):
            assert torch.equal(batch, torch.arange(20.0).reshape(10, 2)[4 * place : 4 * place + 4])
            assert not batch._is_view()
            batch.mul_(0).sub_(7)
    assert applied.store.served and not applied.store.reason


def test_exceptions_and_interrupts_come_through_unchanged(tmp_path):
    class Boom(Exception):
        pass

    hidden = Hidden(None)

    def make(index):
        if index == 37 and hidden.value:
            raise hidden.value
        return torch.tensor([float(index)])

    loader = DataLoader(Made(make, 64), batch_size=8)
    applied = cached(loader, tmp_path)
    for error in (Boom("x"), KeyboardInterrupt()):
        hidden.value = error
        with pytest.raises(type(error)) as caught:
            list(loader)
        assert caught.value is error
    hidden.value = None
    assert torch.equal(torch.cat(list(loader)).ravel(), torch.arange(64.0))
    assert torch.equal(torch.cat(list(loader)).ravel(), torch.arange(64.0))
    assert applied.store.served and not applied.store.reason


def test_a_sample_of_another_shape_later_raises_what_the_stock_loader_raises(tmp_path):
    odd = unproven(300, tmp_path)
    data = Made(lambda index: torch.ones(5 if index == odd else 3), 300)
    with pytest.raises(RuntimeError) as stock:
        list(DataLoader(data, batch_size=10))
    loader = DataLoader(data, batch_size=10)
    applied = cached(loader, tmp_path)
    with pytest.raises(RuntimeError) as mine:
        list(loader)
    assert str(mine.value) == str(stock.value)
    singles = DataLoader(data, batch_size=1)
    assert [batch.shape[1] for batch in singles].count(5) == 1
    applied.close()


def test_partial_epochs_and_two_iterators_at_once(tmp_path):
    data = TensorDataset(torch.arange(50.0), torch.arange(50))
    stock, loader = (DataLoader(data, batch_size=7, shuffle=True) for _ in range(2))
    applied = cached(loader, tmp_path)

    def partly(loader):
        reseed()
        seen = list(itertools.islice(loader, 3))
        for one, other in zip(loader, loader, strict=True):
            seen += [one, other]
        return [*seen, *loader]

    identical(partly(loader), partly(stock))
    assert applied.store.served and not applied.store.reason


def test_batched_reading_is_respected(tmp_path):
    calls = Hidden([])

    class Batched(Made):
        def __getitems__(self, indices):
            calls.value.append(list(indices))
            return [self.make(index) for index in indices]

    class Coupled(Made):
        def __getitems__(self, indices):
            return [torch.tensor(float(index - min(indices))) for index in indices]

    data = Batched(lambda index: torch.tensor(index), 20)
    loader = DataLoader(data, batch_size=5)
    applied = cached(loader, tmp_path)
    calls.value.clear()
    assert torch.equal(torch.cat(list(loader)), torch.arange(20))
    assert calls.value == [list(range(start, start + 5)) for start in range(0, 20, 5)]
    applied.close()
    assert "two results" in refused(DataLoader(Coupled(None, 20), batch_size=5), tmp_path)


def test_a_loader_built_anew_each_epoch_finds_what_the_last_one_filled(tmp_path):
    data = TensorDataset(torch.arange(30.0))
    for number in range(3):
        loader = DataLoader(data, batch_size=4)
        applied = cached(loader, tmp_path)
        list(loader)
        assert applied.store.served == 30 * number
    store = applied.store
    del data, loader
    gc.collect()
    assert store.rows is None  # the map goes with its dataset


def test_the_loader_stays_the_users_own(tmp_path):
    data = TensorDataset(torch.arange(30.0))
    loader = DataLoader(data, batch_size=4)
    before = dict(vars(loader))
    applied = cached(loader, tmp_path)
    assert type(loader) is DataLoader and loader.dataset is data and loader.collate_fn is default_collate
    shallow, deep, stored = copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))
    list(loader)
    served = applied.store.served
    for other in (shallow, deep, stored):
        assert torch.equal(torch.cat([batch for (batch,) in other]), torch.arange(30.0))
        identical(list(pickle.loads(pickle.dumps(other))), list(loader))
    assert applied.store.served == served + 90  # only the loader itself is served
    running = iter(loader)
    next(running)
    applied.close()
    applied.close()
    assert vars(loader) == before and not list(tmp_path.iterdir())
    assert len(list(running)) == 7  # an iterator under way goes on with the dataset
    assert torch.equal(torch.cat([batch for (batch,) in loader]), torch.arange(30.0))


def test_a_collate_function_set_later_is_obeyed(tmp_path):
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)
    applied = cached(loader, tmp_path)
    list(loader)
    loader.collate_fn = len
    assert list(loader) == [4, 4]
    assert "collate" in applied.store.reason


def test_inference_mode_and_lists_as_datasets(tmp_path):
    loader = DataLoader([(torch.tensor([float(n)]), n) for n in range(10)], batch_size=5)
    with torch.inference_mode():
        applied = cached(loader, tmp_path)
        assert all(batch.is_inference() for pair in loader for batch in pair)
    for _ in range(2):
        batches = list(loader)
        assert not batches[0][0].is_inference()
        assert torch.cat([x for x, _ in batches]).ravel().tolist() == list(range(10))
    assert applied.store.served == 20 and not applied.store.reason
    store = applied.store
    del loader
    gc.collect()
    assert store.rows is None


def test_no_effect_until_a_sample_is_asked_for_twice(tmp_path):
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)
    applied = cached(loader, tmp_path)
    assert "second pass" in applied.effect().reason
    list(loader)
    assert "second pass" in applied.effect().reason
    list(loader)
    assert applied.effect() is None and applied.one_off_seconds > 0
    with pytest.raises(NotImplementedError):
        applied.switch(False)


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)
    outcome = Cache().at(LoaderReady(loader=loader, scratch=str(blocked)), DEFAULTS)
    assert isinstance(outcome, NoEffect) and "Error" in outcome.reason


def measured(share, *loaders, steps=None):
    none = unknown("s")
    value = Quantity(share, "1") if share is not None else unknown("1")
    anatomy = Anatomy(
        step=Quantity(1.0, "s"), phases=(Phase("data", value, value),), steps_seen=10, warmup_steps=1, warmup=none,
        startup=none, evaluation=none, checkpointing=none, micro_batches=Quantity(1.0, "1"), samples=none,
    )  # fmt: skip
    facts = ScriptFacts(loaders=loaders, steps_total=steps)
    return Measurement(script="t.py", arguments=(), created="", anatomy=anatomy, facts=facts)


def facts(**changes):
    base = {"name": "l", "dataset": "D", "training": True, "workers": 0, "batch_size": 10, "samples": 1000}
    return LoaderFacts(**{**base, "iterable": False, **changes})


def test_the_verdict_follows_what_was_seen():
    check = Cache().check
    for seen in (
        measured(0.5),
        measured(0.5, facts(training=False)),
        measured(0.5, facts(iterable=True)),
        measured(0.5, facts(workers=4)),
        measured(0.01, facts()),
        measured(0.5, facts(), steps=100),  # one pass
    ):
        assert not check(seen).applies and check(seen).reason
    whole, few = check(measured(0.5, facts())), check(measured(0.5, facts(), steps=200))
    assert whole.applies and few.applies and 1 < few.gain < whole.gain < 2
    assert "2.0 passes" in few.rests_on
    assert check(measured(None, facts())).applies and check(measured(None, facts())).gain is None
