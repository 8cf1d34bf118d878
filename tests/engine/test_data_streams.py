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


@pytest.mark.parametrize("kind", [Stream, Fresh])
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_again_and_again_each_sample_comes_once(kind, workers):
    """Also where the loader itself would count what it reads on to its place twice."""
    arguments = {"loader": {"num_workers": workers}} if workers else {}
    data = opened(kind(), **arguments)
    whole = rows(data.epoch(1))
    data.close()
    state, got = None, []
    for batches in (1, 2, 0, 1, 1, 9):
        data = opened(kind(), **arguments)
        if state is not None:
            data.load_state_dict(state)
        passing = data.epoch(1, len(got))
        for _ in range(batches):
            got += rows([batch] if (batch := next(passing, None)) else [])
        state = data.state_dict()
        passing.close()
        data.close()
    assert sorted(row[0] for row in got) == sorted(row[0] for row in whole)
    assert workers or got == whole


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


def ranked(world, work):
    """`work(rank, agree)` in a thread for each rank; what they returned."""
    ranks, found = Ranks(world), {}

    def one(rank):
        found[rank] = work(rank, ranks.of(rank))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for item in threads:
        item.start()
    for item in threads:
        item.join(20)
    return [found[rank] for rank in range(world)]


class Silent(IterableDataset):
    """Draws nothing: the threads share one set of random streams."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(torch.arange(self.n, dtype=torch.float32)[:, None])


@pytest.mark.parametrize("n", [40, 43, 33, 8, 1])
def test_ranks_share_a_stream_and_end_together(n):
    world = 2
    one, two = ranked(
        world, lambda rank, agree: list(opened(Silent(n), world=world, rank=rank, micro_batch=2, agree=agree).epoch(0))
    )
    assert len(one) == len(two)
    assert sorted(row[0] for row in rows(one) + rows(two)) == list(range(n))
    for first, second in zip(one, two, strict=True):
        parts = [*first.parts, *second.parts]
        values = [row[0] for row in rows([first, second])]
        mean = sum(part.weight * part.batch.mean().item() for part in parts) / world
        assert mean == pytest.approx(sum(values) / len(values)) and first.samples == second.samples == len(values)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("world", "micro"), [(2, 1), (2, 2), (2, 4), (4, 2), (4, 1)])
def test_ranks_stopped_after_any_batch_go_on_with_each_sample_once(world, micro, stateful, monkeypatch):
    if stateful:
        pytest.importorskip("torchdata.stateful_dataloader")
    else:
        monkeypatch.setattr("upshift._optional.available", lambda name: False)

    def begun(rank, agree):
        data = opened(Silent(43), world=world, rank=rank, micro_batch=micro, agree=agree)
        passing = data.epoch(0)
        return rows([next(passing) for _ in range(done)]), data.state_dict()

    def goes_on(rank, agree):
        data = opened(Silent(43), world=world, rank=rank, micro_batch=micro, agree=agree)
        data.load_state_dict(before[rank][1])
        return rows(data.epoch(0, 8 * done))

    for done in (1, 2, 5):
        before = ranked(world, begun)
        assert all(state["number"] == before[0][1]["number"] for _, state in before)
        after = ranked(world, goes_on)
        assert sorted(row[0] for part in before for row in part[0]) == list(range(8 * done))
        assert sorted(row[0] for part in after for row in part) == list(range(8 * done, 43))


@pytest.mark.parametrize(("then", "now"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_ranks_goes_on_by_the_number_of_samples(then, now):
    def begun(rank, agree):
        data = opened(Silent(43), world=then, rank=rank, micro_batch=None, agree=agree)
        passing = data.epoch(0)
        for _ in range(3):
            next(passing)
        return data.state_dict()

    def goes_on(rank, agree):
        data = opened(Silent(43), world=now, rank=rank, micro_batch=None, agree=agree)
        data.load_state_dict(state)
        return rows(data.epoch(0, 24))

    state = ranked(then, begun)[0]
    assert sorted(row[0] for part in ranked(now, goes_on) for row in part) == list(range(24, 43))


class Sharded(IterableDataset):
    """Shards itself, and not evenly: the first rank has the fewest."""

    def __init__(self, rank, n):
        self.rank, self.n = rank, n

    def __iter__(self):
        return iter(torch.arange(self.n, dtype=torch.float32)[:, None] + 1000.0 * self.rank)


def test_ranks_with_shards_of_their_own_go_on_each_at_its_place():
    lengths = (9, 30)

    def begun(rank, agree):
        data = opened(Sharded(rank, lengths[rank]), world=2, rank=rank, micro_batch=2, agree=agree, sharded=True)
        passing = data.epoch(0)
        batches = [next(passing) for _ in range(4)]
        return rows(batches), data.state_dict(), sum(batch.samples for batch in batches)

    def goes_on(rank, agree):
        data = opened(Sharded(rank, lengths[rank]), world=2, rank=rank, micro_batch=2, agree=agree, sharded=True)
        data.load_state_dict(before[rank][1])
        return rows(data.epoch(0, before[rank][2]))

    before = ranked(2, begun)
    after = ranked(2, goes_on)
    everything = sorted(row[0] for part in (*(item[0] for item in before), *after) for row in part)
    assert everything == [*map(float, range(9)), *(1000.0 + i for i in range(30))]


def test_a_rank_without_any_samples_is_told():
    data = opened(Silent(0), world=2, rank=1, micro_batch=2, agree=lambda values: [values[0] + 2.0], sharded=True)
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
