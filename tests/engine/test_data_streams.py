"""Iterable datasets: read once, resumed at their place, dealt to ranks that end together."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch.utils.data import IterableDataset

from upshift.engine.data import open_data
from upshift.errors import DataChangedError, DataError, EmptyDataError, UsageError


class Stream(IterableDataset):
    """`n` samples with random augmentation; knows its place, as torchdata asks."""

    def __init__(self, n=43):
        self.n, self.place = n, 0

    def __iter__(self):
        while self.place < self.n:
            self.place += 1
            yield torch.tensor([float(self.place - 1), random.random()])
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Fresh(IterableDataset):
    """Begins anew whenever it is iterated."""

    def __init__(self, n=43):
        self.n = n

    def __iter__(self):
        for index in range(self.n):
            yield torch.tensor([float(index), float(torch.rand(()))])


def opened(data, **more):
    return open_data(data, **{"seed": 4, "global_batch": 8, "micro_batch": 4, **more})


def rows(batches):
    return [row for batch in batches for part in batch.parts for row in part.batch[: part.n].tolist()]


def test_each_sample_comes_once_in_order():
    data = opened(Fresh())
    assert data.length is None and data.steps is None
    whole = list(data.epoch(0))
    assert [row[0] for row in rows(whole)] == list(range(43))
    assert [batch.samples for batch in whole] == [8] * 5 + [3]
    for batch in whole:
        assert sum(part.weight for part in batch.parts) == pytest.approx(1.0)
    assert rows(data.epoch(0)) == rows(whole) != rows(data.epoch(1))


def test_the_streams_of_the_training_are_left_alone():
    before = torch.get_rng_state(), random.getstate()
    list(opened(Fresh()).epoch(0))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("cursor", [0, 8, 24, 40, 43])
def test_a_resumed_run_skips_what_it_has_trained_on(cursor):
    told = []
    whole = rows(opened(Fresh()).epoch(2))
    data = opened(Fresh(), say=told.append)
    assert rows(data.epoch(2, cursor)) == whole[cursor:]
    assert any(f"skipping {cursor} samples" in text for text in told) == bool(cursor)


def test_without_torchdata_it_is_said(monkeypatch):
    monkeypatch.setattr("upshift._optional.available", lambda name: False)
    told = []
    data = opened(Stream(), say=told.append)
    assert not data.stateful and "upshift[data]" in told[0] and "exact only if" in told[0]
    passing = data.epoch(0)
    next(passing)
    assert data.state_dict()["loader"] is None


def test_with_torchdata_it_goes_on_at_its_place():
    pytest.importorskip("torchdata.stateful_dataloader")
    for workers in (0, 1):
        arguments = {"loader": {"num_workers": workers}} if workers else {}
        data, told = opened(Stream(), **arguments), []
        whole = rows(data.epoch(1))
        data = opened(Stream(), **arguments)
        passing = data.epoch(1)
        for _ in range(3):
            next(passing)
        state = data.state_dict()
        data.close()
        later = opened(Stream(), say=told.append, **arguments)
        later.load_state_dict(state)
        got = rows(later.epoch(1, 24))
        later.close()
        assert not any("skipping" in text for text in told)
        assert [row[0] for row in got] == [row[0] for row in whole[24:]]
        if not workers:
            assert got == whole[24:]


def test_another_number_of_workers_is_refused():
    data = opened(Fresh())
    passing = data.epoch(0)
    next(passing)
    other = opened(Fresh(), loader={"num_workers": 1})
    with pytest.raises(DataChangedError, match="read by 0 workers and is now by 1"):
        other.load_state_dict(data.state_dict())


class Ranks:
    """Sums over threads that stand for ranks."""

    def __init__(self, world):
        self.barrier, self.sums, self.world = threading.Barrier(world), [0.0] * world, world

    def of(self, rank):
        def agree(values):
            self.sums[rank] = values[0]
            self.barrier.wait(20)
            total = sum(self.sums)
            self.barrier.wait(20)
            return [total]

        return agree


class Silent(IterableDataset):
    """Draws nothing: the threads share one set of random streams."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(torch.arange(self.n, dtype=torch.float32)[:, None])


@pytest.mark.parametrize("n", [40, 43, 33, 8])
def test_ranks_share_a_stream_and_end_together(n):
    world = 2
    ranks, found = Ranks(world), {}

    def read(rank):
        data = opened(Silent(n), world=world, rank=rank, micro_batch=2, agree=ranks.of(rank))
        found[rank] = list(data.epoch(0))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world)]
    for item in threads:
        item.start()
    for item in threads:
        item.join(20)
    one, two = found[0], found[1]
    assert len(one) == len(two)
    assert sorted(row[0] for row in rows(one) + rows(two)) == list(range(n))
    for first, second in zip(one, two, strict=True):
        parts = [*first.parts, *second.parts]
        values = [row[0] for row in rows([first, second])]
        mean = sum(part.weight * part.batch.mean().item() for part in parts) / world
        assert mean == pytest.approx(sum(values) / len(values)) and first.samples == second.samples == len(values)


def test_a_rank_without_any_samples_is_told():
    data = opened(Silent(2), world=2, rank=1, micro_batch=2, agree=lambda values: [values[0] + 2.0])
    with pytest.raises(DataError, match="the stream of rank 1 is empty"):
        list(data.epoch(0))


def test_refusals():
    with pytest.raises(EmptyDataError, match="no samples"):
        list(opened(Fresh(0)).epoch(0))
    with pytest.raises(UsageError, match="cannot be dealt evenly"):
        opened(Fresh(), world=3, agree=list)
    with pytest.raises(UsageError, match="agree on its end"):
        opened(Fresh(), world=2)
    with pytest.raises(UsageError, match="no argument of the loader"):
        opened(Fresh(), loader={"batch_size": 3})
