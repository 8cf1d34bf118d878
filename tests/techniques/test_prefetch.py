"""prefetch: the script's batches are the stock ones, whatever it does with them; and what is sent ahead is used."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import UserDict, defaultdict, namedtuple

import msgspec
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from upshift.sites import LoaderReady, NoEffect
from upshift.sites.twins import destination, movable, twin
from upshift.techniques.prefetch import IN_VAIN, Ahead, Place, Prefetch, PrefetchApplied, Staged
from upshift.testing.contract import measurement

TECHNIQUE = Prefetch()
CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


class FakeSent:
    def __init__(self, lane, host):
        self.lane, self.there = lane, host.clone()

    def take(self):
        self.lane.taken += 1
        return self.there

    def wait(self):
        self.lane.waited += 1


class FakeLane:
    """Copies to the CPU take the part of copies to a device."""

    kind = "cpu"

    def __init__(self):
        self.sent = self.taken = self.waited = 0

    def send(self, host, device):
        assert device == CPU
        self.sent += 1
        return FakeSent(self, host)


class Items(Dataset):
    def __init__(self, form, count=20):
        self.form, self.count = form, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        x, y = torch.full((3,), float(index)), torch.tensor(index)
        return {
            "tuple": lambda: (x, y),
            "dict": lambda: {"x": x, "deep": [y, {"name": "n"}]},
            "named": lambda: Pair(x, y),
            "user": lambda: UserDict(x=x, y=y),
        }[self.form]()


def leaves(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, (dict, UserDict)):
        batch = batch.values()
    return [leaf for item in batch if not isinstance(item, str) for leaf in leaves(item)]


def user_collate(samples):
    batch = torch.utils.data.default_collate([dict(item) for item in samples])
    return UserDict(batch)


def loader_of(form, **more):
    torch.manual_seed(3)
    more.update(collate_fn=user_collate) if form == "user" else None
    return DataLoader(Items(form), batch_size=4, shuffle=True, **more)


@pytest.mark.parametrize(("form", "workers"), [("tuple", 0), ("dict", 0), ("named", 0), ("user", 0), ("dict", 2)])
def test_batches_are_the_stock_ones_and_most_come_from_the_lane(form, workers):
    stock = loader_of(form, num_workers=workers)
    wanted = [leaves(batch) for _ in range(2) for batch in stock]
    loader, lane = loader_of(form, num_workers=workers), FakeLane()
    applied = PrefetchApplied(loader, lane)
    found = []
    for batch in (batch for _ in range(2) for batch in loader):
        assert type(batch) is {"tuple": list, "dict": dict, "named": Pair, "user": UserDict}[form]
        found.append([leaf.to("cpu") for leaf in leaves(batch)])
    assert [[leaf.tolist() for leaf in batch] for batch in found] == [[leaf.tolist() for leaf in x] for x in wanted]
    assert all(type(leaf) is torch.Tensor for batch in found for leaf in batch)
    # All but the first batch, from which the destination is learned, and one more that was fetched early.
    assert lane.taken == 2 * (10 - (2 if workers else 1)) and applied.effect() is None


def staged(value=None, lane=None, place=None):
    host = torch.arange(6.0).reshape(2, 3) if value is None else value
    place = place or Place()
    place.device = CPU
    lane = lane or FakeLane()
    return twin(Staged(host, place, lane), host), host, lane


USES = {
    "print": lambda x: repr(x),
    "numpy": lambda x: x.numpy().tolist(),
    "tolist": lambda x: x.tolist(),
    "sum": lambda x: x.sum().item(),
    "index": lambda x: x[1].tolist(),
    "write a row": lambda x: (x[0].mul_(2), x.to("cpu").tolist())[1],
    "write in place": lambda x: x.add_(1).to("cpu").tolist(),
    "write through data": lambda x: (x.data.zero_(), x.to("cpu").tolist())[1],
    "write through numpy": lambda x: (x.numpy().fill(7), x.to("cpu").tolist())[1],
    "resize": lambda x: (x.unsqueeze_(0), x.shape, len(x), x.dim())[1:],
    "iterate": lambda x: [row.tolist() for row in x],
    "in a list": lambda x: torch.stack([x, x]).tolist(),
    "as the other operand": lambda x: (torch.ones(2, 3) - x).tolist(),
    "another dtype": lambda x: (x.to("cpu", torch.float64).dtype, x.to(torch.int64).tolist()),
    "like another": lambda x: x.to(torch.zeros(1, dtype=torch.float64)).dtype,
    "a gradient": lambda x: (x.requires_grad_(), (x * x).sum().backward(), x.grad.tolist(), x.to("cpu").is_leaf)[2:],
    "what it is": lambda x: (x.shape, x.dtype, x.device, x.size(1), x.stride(), len(x), x.requires_grad, x.is_cuda),
    "isinstance": lambda x: isinstance(x, torch.Tensor),
    "pickled": lambda x: (type(pickle.loads(pickle.dumps(x))), pickle.loads(pickle.dumps(x)).tolist()),
    "deep copied": lambda x: (type(copy.deepcopy(x)), copy.deepcopy([x])[0].tolist()),
    "moved twice": lambda x: (x.to("cpu").tolist(), x.to("cpu").tolist()),
    "noise": lambda x: (torch.manual_seed(1), torch.rand_like(x).tolist())[1],
    "a linear layer": lambda x: torch.nn.functional.linear(x, torch.ones(4, 3)).tolist(),
}


@pytest.mark.parametrize("use", USES)
def test_a_twin_is_the_tensor_it_stands_for(use):
    made, _, _ = staged()
    assert USES[use](made) == USES[use](torch.arange(6.0).reshape(2, 3))


def test_hash_and_identity_do_not_change_with_use():
    made, _, _ = staged()
    kept = {made: 1}
    made.add_(1)
    assert kept[made] == 1


def test_saved_without_a_trace():
    made, host, _ = staged()
    file = io.BytesIO()
    torch.save({"x": made}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["x"], host)


def test_a_write_after_the_copy_was_taken_waits_for_it():
    made, _, lane = staged()
    there = made.to("cpu")
    assert (lane.taken, lane.waited) == (1, 0)
    made.add_(1)
    assert lane.waited == 1 and there.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_copy_is_handed_out_once():
    made, _, lane = staged()
    first, second = made.to("cpu"), made.to("cpu")
    first.zero_()
    assert second.tolist() == [[0, 1, 2], [3, 4, 5]] and lane.taken == 1


def test_what_is_changed_first_is_soon_no_longer_sent():
    place, lane = Place(), FakeLane()
    for _ in range(10):
        made, _, _ = staged(lane=lane, place=place)
        made.add_(1).to("cpu")
    assert lane.sent == IN_VAIN and lane.taken == 0


class Iterator:
    """What `Ahead` knows of an iterator of a DataLoader."""

    def __init__(self, batches):
        self.batches, self.asked, self._num_yielded = batches, 0, 0

    def _next_data(self):
        self.asked += 1
        found = self.batches[self.asked - 1] if self.asked <= len(self.batches) else StopIteration()
        if isinstance(found, BaseException):
            raise found
        return found

    def __next__(self):
        found = self.ahead()
        self._num_yielded += 1
        return found


def iterating(batches, early=True):
    iterator = Iterator(batches)
    iterator.ahead = Ahead(iterator, defaultdict(Place), FakeLane(), early)
    return iterator


def test_one_batch_is_fetched_early_where_that_changes_nothing():
    early, late = iterating(list("abc")), iterating(list("abc"), early=False)
    assert (next(early), early.asked) == ("a", 2)
    assert (next(late), late.asked) == ("a", 1)


def test_an_error_is_raised_at_its_own_batch():
    iterator = iterating(["a", ValueError("broken"), "c"])
    assert next(iterator) == "a"
    with pytest.raises(ValueError, match="broken"):
        next(iterator)
    assert next(iterator) == "c"
    with pytest.raises(StopIteration):
        next(iterator)


def test_another_pass_begins_with_its_own_first_batch():
    iterator = iterating(list("abcdef"))
    next(iterator)
    iterator.asked, iterator._num_yielded = 3, 0  # as a persistent iterator is reset
    assert next(iterator) == "d"


def test_an_iterator_dies_with_its_last_reference():
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)
    applied = PrefetchApplied(loader, FakeLane())
    gc.disable()
    try:
        iterator = iter(loader)
        assert len(list(iterator)) == 2
        gone = weakref.ref(iterator)
        del iterator
        assert gone() is None
    finally:
        gc.enable()
    applied.close()
    assert type(next(iter(loader))[0]) is torch.Tensor


def test_only_own_order_is_fetched_early():
    class Mine(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(torch.randperm(20).tolist())

        def __len__(self):
            return 20

    for more, early in (({"shuffle": True}, True), ({}, True), ({"sampler": Mine()}, False)):
        loader = DataLoader(Items("tuple"), batch_size=4, num_workers=1, **more)
        assert ("early" in PrefetchApplied(loader, FakeLane()).note) is early
    assert "early" not in PrefetchApplied(DataLoader(Items("tuple"), batch_size=4), FakeLane()).note


def test_it_says_when_nothing_was_moved():
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)
    applied = PrefetchApplied(loader, FakeLane())
    assert [float(x.sum()) for (x,) in loader] == [6.0, 22.0]
    assert isinstance(applied.effect(), NoEffect)


def test_check_and_refusals():
    assert not TECHNIQUE.check(measurement()).applies
    assert TECHNIQUE.check(measurement(device="cuda:0")).applies is False  # copies are known, and none
    assert not TECHNIQUE.check(measurement(device="cuda:0", loaders=())).applies
    seen = measurement(device="cuda:0")
    phases = [item for item in seen.anatomy.phases if item.name != "h2d"]
    seen = msgspec.structs.replace(seen, anatomy=msgspec.structs.replace(seen.anatomy, phases=tuple(phases)))
    assert TECHNIQUE.check(seen).applies and TECHNIQUE.check(seen).gain is None
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4)
    if not torch.backends.cuda.is_built():
        assert "CUDA" in TECHNIQUE.at(LoaderReady(loader=loader), {}).reason
    assert not movable(torch.ones(2, 3).t()) and not movable(torch.ones(2, requires_grad=True))
    assert destination(False, torch.ones(1), ("meta",), {}) == torch.device("meta")
    assert destination(False, torch.ones(1), ("meta",), {"memory_format": torch.contiguous_format}) is None
    assert destination(False, torch.ones(1), (torch.float64,), {}) is None


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pinned", [False, True])
def test_on_cuda_every_batch_arrives_whole(workers, pinned):
    torch.zeros(1, device="cuda")
    data = torch.arange(64.0 * 4096).reshape(64, 4096)
    loader = DataLoader(TensorDataset(data, torch.arange(64)), batch_size=8, num_workers=workers, pin_memory=pinned)
    applied = TECHNIQUE.at(LoaderReady(loader=loader), {})
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(4):
        for number, (x, y) in enumerate(loader):
            there, label = x.to("cuda", non_blocking=True), y.cuda()
            for _ in range(4):  # the stream that computes is behind, the one that copies is not
                busy = (busy @ busy).clamp(-1, 1)
            assert torch.equal(there.cpu(), data[number * 8 : number * 8 + 8])
            assert label.tolist() == list(range(number * 8, number * 8 + 8))
            del there, label  # their memory is used again at once
    assert applied.effect() is None
    applied.close()


@pytest.mark.cuda
def test_on_cuda_training_is_the_same_to_the_bit():
    def train(ahead):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 10)).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        data = TensorDataset(torch.randn(256, 256), torch.randint(0, 10, (256,)))
        loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=2)
        if ahead:
            assert TECHNIQUE.at(LoaderReady(loader=loader), {}).note
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x.cuda()), y.cuda()).backward()
                optimizer.step()
        return [item.tolist() for item in net.parameters()]

    assert train(False) == train(True)
