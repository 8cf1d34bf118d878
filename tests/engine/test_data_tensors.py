"""Data in memory: the batches are rows of the tensors in the order of the epoch, gathered in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from upshift.engine import tensors
from upshift.engine.data import divide, open_data
from upshift.engine.order import order
from upshift.errors import BatchTooLargeError, DataChangedError, DataError, EmptyDataError, UsageError

X = torch.arange(53 * 3, dtype=torch.float32).reshape(53, 3)
Y = torch.arange(53)


@pytest.fixture(params=[1, 150, 2**22], ids=["one batch a block", "few", "all"])
def block(request, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", request.param)


def opened(data=None, **more):
    return open_data((X, Y) if data is None else data, **{"seed": 4, "global_batch": 8, **more})


def test_batches_are_the_rows_in_order(block):
    rows, place = order(53, 4, 2), 0
    for batch in opened().epoch(2):
        (part,) = batch.parts
        own = rows[place : place + 8]
        assert part.indices == own.tolist()
        assert torch.equal(part.batch[0], X[own]) and torch.equal(part.batch[1], Y[own])
        assert (part.weight, part.n, batch.samples, batch.lost) == (1.0, len(own), len(own), 0)
        place += batch.samples
    assert place == 53


def test_resuming_at_every_cursor_gives_the_same_batches(block):
    whole = list(opened(micro_batch=3).epoch(1))
    cursor = 0
    for number, batch in enumerate(whole):
        rest = list(opened(micro_batch=3).epoch(1, cursor))
        assert len(rest) == len(whole) - number
        for one, other in zip(rest[0].parts, batch.parts, strict=True):
            assert torch.equal(one.batch[0], other.batch[0]) and one.indices == other.indices
            # The same offset in a block: kernels may round differently elsewhere.
            assert one.batch[0].storage_offset() == other.batch[0].storage_offset()
        cursor += batch.samples
    assert list(opened().epoch(1, cursor)) == []


def test_micro_batches_and_ranks_share_out_each_batch(block):
    ranks = [list(opened(micro_batch=2, world=3, rank=rank).epoch(0)) for rank in range(3)]
    alone = list(opened().epoch(0))
    for number, batch in enumerate(alone):
        shares = [own[number] for own in ranks]
        assert [index for share in shares for part in share.parts for index in part.indices] == batch.parts[0].indices
        values = torch.cat([part.batch[0][: part.n] for share in shares for part in share.parts])
        assert torch.equal(values, batch.parts[0].batch[0])
        weighted = sum(part.weight * part.batch[0].mean(0) for share in shares for part in share.parts) / 3
        torch.testing.assert_close(weighted, batch.parts[0].batch[0].mean(0))


def test_a_rank_without_samples_has_a_stand_in():
    data = opened((X[:2], Y[:2]), global_batch=2, world=4, rank=0)
    (batch,) = data.epoch(0)
    (part,) = batch.parts
    assert (part.weight, part.n, part.indices, len(part.batch[0])) == (0.0, 0, [], 1)


@pytest.mark.parametrize("data", [
    {"x": X, "label": Y},
    TensorDataset(X, Y),
    (X.numpy(), Y.numpy()),
    lambda: (X, Y),
], ids=["dict", "TensorDataset", "numpy", "function"])  # fmt: skip
def test_kinds_of_tensors(data):
    found = opened(data)
    assert found.kind == "tensors" and found.length == 53 and found.steps == 7
    batch = next(found.epoch(0)).parts[0]
    values = tuple(batch.batch.values()) if isinstance(batch.batch, dict) else batch.batch
    assert not isinstance(data, dict) or list(batch.batch) == ["x", "label"]
    assert torch.equal(values[0], X[batch.rows]) and torch.equal(values[1], Y[batch.rows])


def test_a_tensor_alone_and_a_part_of_a_dataset():
    part = next(opened(X).epoch(0)).parts[0]
    assert torch.equal(part.batch, X[part.rows])
    chosen = Subset(Subset(TensorDataset(X, Y), list(range(10, 40))), [3, 1, 2, 29, 0, 9, 8, 7])
    data = opened(chosen, global_batch=8)
    assert data.kind == "tensors"
    part = next(data.epoch(0)).parts[0]
    assert part.batch[1].tolist() == [chosen[index][1] for index in part.indices]


def test_a_smaller_micro_batch_in_the_middle(block):
    data, whole = opened(), list(opened().epoch(0))
    got = []
    for number, batch in enumerate(data.epoch(0)):
        got.append(batch)
        if number == 2:
            data.micro_batch = 3
    assert [len(batch.parts) for batch in got] == [1, 1, 1, 3, 3, 3, 2]
    for one, other in zip(got, whole, strict=True):
        assert [index for part in one.parts for index in part.indices] == other.parts[0].indices
        assert torch.equal(torch.cat([part.batch[0] for part in one.parts]), other.parts[0].batch[0])
        assert sum(part.weight for part in one.parts) == pytest.approx(1.0)


def test_evaluation_keeps_the_order_and_may_be_smaller_than_a_batch():
    data = opened(global_batch=100, training=False)
    (batch,) = data.epoch(9)
    assert batch.parts[0].indices == list(range(53)) and batch.parts[0].weight == 1.0


def test_changing_the_data_in_place_is_told():
    x = X.clone()
    passing = opened((x, Y), shuffle=False).epoch(0)
    next(passing).parts[0].batch[0].mul_(2)
    with pytest.raises(DataError, match="changed its data in place"):
        list(passing)
    shuffled = opened((x, Y)).epoch(0)
    before = x.clone()
    next(shuffled).parts[0].batch[0].mul_(2)
    list(shuffled)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("data", "error", "text"), [
    ((X[:0], Y[:0]), EmptyDataError, "no samples"),
    ((X, Y[:5]), UsageError, r"different lengths: \[53, 5\]"),
    ((X[:5], Y[:5]), BatchTooLargeError, "8 samples is larger than the data, 5"),
    ((X.clone().requires_grad_(), Y), UsageError, "requires a gradient"),
    ((X, torch.tensor(1)), UsageError, "without dimensions"),
    (3, UsageError, "data of type int cannot"),
])  # fmt: skip
def test_data_that_cannot_be_trained_on(data, error, text):
    with pytest.raises(error, match=text):
        opened(data)


def test_a_resume_with_other_data_is_refused():
    state = opened().state_dict()
    with pytest.raises(DataChangedError, match="length was 53 and is 50"):
        opened((X[:50], Y[:50])).load_state_dict(state)
    with pytest.raises(DataChangedError, match="sample 60 of an epoch of 53"):
        next(opened().epoch(0, 60))
    opened().load_state_dict(state)


def test_a_micro_batch_is_divided():
    part = next(opened({"x": X, "label": Y}).epoch(0)).parts[0]
    part = part._replace(batch={**part.batch, "names": [str(index) for index in part.indices], "scale": 2.0})
    smaller = divide(part, 3)
    assert [len(item.batch["x"]) for item in smaller] == [2, 3, 3]
    assert [name for item in smaller for name in item.batch["names"]] == [str(index) for index in part.indices]
    assert sum(item.weight for item in smaller) == 1.0 and all(item.batch["scale"] == 2.0 for item in smaller)
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        divide(part._replace(batch={"x": torch.zeros(3)}), 3)


def test_no_global_random_state_is_touched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(opened().epoch(0))
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
