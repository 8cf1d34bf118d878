"""Every sample once an epoch, in one order, whoever reads it; weights that make the mean of the global batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.engine.order import ORDER, batches, mix, order, pieces, spans

sizes = st.integers(1, 60)


def test_seeds_are_stable_and_apart():
    """Written down, so that a run can be resumed with a later version."""
    assert mix(0, 0, 0) == 1445694884619442965
    assert mix(1, 2, 3) == 6520558355739401531
    assert mix(-1) == mix(2**64 - 1) < 2**63
    assert len({mix(0, seed, epoch) for seed in range(40) for epoch in range(40)}) == 1600


def test_the_order_is_that_permutation():
    expected = torch.randperm(1000, generator=torch.Generator().manual_seed(mix(ORDER, 7, 3)))
    assert torch.equal(order(1000, 7, 3), expected)
    assert not torch.equal(order(1000, 7, 4), expected)
    assert not torch.equal(order(1000, 8, 3), expected)
    assert order(5, 7, 3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_the_order_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    order(100, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


@given(n=sizes, seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_the_order_is_a_permutation(n, seed, epoch):
    assert sorted(order(n, seed, epoch).tolist()) == list(range(n))


@given(size=sizes, world=st.integers(1, 9), micro=st.one_of(st.none(), st.integers(1, 20)))
def test_spans_cover_a_batch_in_equal_pieces(size, world, micro):
    covered = []
    for rank in range(world):
        own = spans(size, world, rank, micro)
        counts = [span.n for span in own]
        assert max(counts) - min(counts) <= 1
        assert micro is None or max(counts) <= micro
        if not counts[0]:
            assert own == ((0, 1, 0, 0.0),)
            continue
        assert abs(sum(counts) - size / world) < 1
        covered += [place for span in own for place in range(span.start, span.stop)]
    assert covered == list(range(size))


def test_a_whole_batch_has_weight_one():
    """Exactly, so that nothing is multiplied where nothing is cut."""
    for size in range(1, 200):
        assert spans(size)[0].weight == 1.0


@given(
    n=sizes,
    global_batch=st.integers(1, 30),
    world=st.integers(1, 5),
    micro=st.one_of(st.none(), st.integers(1, 9)),
    cursor=st.integers(0, 60),
)
def test_weights_make_the_mean_of_the_global_batch(n, global_batch, world, micro, cursor):
    """The oracle: ranks average their sums of weight * mean(loss)."""
    rows, cursor = order(n, 3, 1), min(cursor, n)
    loss = torch.rand(n, dtype=torch.float64)
    ranks = [
        list(pieces(rows, global_batch=global_batch, world=world, rank=rank, micro_batch=micro, cursor=cursor))
        for rank in range(world)
    ]
    for number, (start, size) in enumerate(batches(n, global_batch, cursor)):
        sums = [sum(piece.weight * loss[piece.indices].mean() for piece in own[number]) for own in ranks]
        assert math.isclose(sum(sums) / world, loss[rows[start : start + size]].mean(), rel_tol=1e-12)


@settings(deadline=None)
@given(
    n=st.integers(1, 150),
    global_batch=st.integers(1, 30),
    legs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_each_sample_once_while_ranks_come_and_go(n, global_batch, legs):
    """Any world size and micro-batch from any cursor on; the order of the global batches stays."""
    rows, cursor, seen = order(n, 5, 2), 0, []
    legs = [*legs, (2, 3, n)]
    for world, micro, updates in legs:
        ranks = [
            list(pieces(rows, global_batch=global_batch, world=world, rank=rank, micro_batch=micro, cursor=cursor))
            for rank in range(world)
        ]
        for number, (_, size) in enumerate(batches(n, global_batch, cursor)):
            if number == updates:
                break
            for own in ranks:
                seen += [index for piece in own[number] for index in piece.indices[: piece.n].tolist()]
            cursor += size
    assert seen == rows.tolist()


@pytest.mark.parametrize("worlds", [(4, 2, 4), (1, 3, 1)])
def test_four_two_four(worlds):
    rows, seen, cursor = order(103, 0, 0), [], 0
    for world, until in zip(worlds, (40, 70, 103), strict=True):
        first = cursor
        for rank in range(world):
            place = first
            for own in pieces(rows, global_batch=10, world=world, rank=rank, micro_batch=3, cursor=first):
                if place >= until:
                    break
                seen += [index for piece in own for index in piece.indices[: piece.n].tolist()]
                place += 10
        cursor = until
    assert sorted(seen) == list(range(103))
