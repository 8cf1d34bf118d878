"""device_dataset: the same batches in the same order, gathered elsewhere; dropped when data changes or does not fit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from upshift.records.measurement import LoaderFacts
from upshift.sites import LoaderReady, NoEffect
from upshift.techniques import device_dataset
from upshift.techniques.device_dataset import AFTER, DeviceDataset, DeviceDatasetApplied, refusal, resident_of
from upshift.testing.contract import measurement

TECHNIQUE = DeviceDataset()


def tensors(count=48):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    return images, torch.arange(count), torch.randint(0, 255, (count, 5), dtype=torch.uint8, generator=generator)


def whole(count=48):
    return TensorDataset(*tensors(count))


def halves(count=48):
    return random_split(whole(count), [0.75, 0.25], generator=torch.Generator().manual_seed(2))[0]


def nested(count=48):
    return Subset(Subset(whole(count), list(range(count - 1, -1, -1))), torch.arange(2, count - 2))


def applied_to(loader, free=2**30):
    """The CPU takes the part of the device."""
    assert refusal(loader) == ""
    return DeviceDatasetApplied(loader, resident_of(loader.dataset, 0.25, "cpu", lambda device: free))


def shuffled(dataset, **more):
    torch.manual_seed(5)
    return DataLoader(dataset, batch_size=4, shuffle=True, **more)


@pytest.mark.parametrize("make", [whole, halves, nested])
@pytest.mark.parametrize("more", [{}, {"drop_last": True}, {"pin_memory": torch.cuda.is_available()}])
def test_same_batches_in_the_same_order(make, more):
    stock, loader = shuffled(make(), **more), None
    wanted = [batch for _ in range(3) for batch in stock]
    drawn = torch.rand(1)
    loader = shuffled(make(), **more)
    applied = applied_to(loader)
    found = []
    for batch in (batch for _ in range(3) for batch in loader):
        assert type(batch) is list and all(isinstance(item, torch.Tensor) for item in batch)
        found.append([item.to("cpu") for item in batch])
    assert torch.equal(torch.rand(1), drawn), "the random stream is elsewhere"
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        for ours, other in zip(mine, theirs, strict=True):
            assert type(ours) is torch.Tensor and torch.equal(ours, other)
            assert (ours.dtype, ours.stride()) == (other.dtype, other.stride())
    assert applied._resident.served == 3 * (len(wanted) - AFTER) and applied.effect() is None and not applied.problem


def test_batches_can_be_used_on_the_cpu():
    loader = DataLoader(whole(), batch_size=4)
    applied_to(loader)
    images, _, _ = tensors()
    for number, (x, y, _) in enumerate(loader):
        assert y.tolist() == list(range(number * 4, number * 4 + 4))
        assert torch.equal(torch.from_numpy(x.numpy()), images[number * 4 : number * 4 + 4])
        x.mul_(2)
        assert torch.equal(x.to("cpu"), images[number * 4 : number * 4 + 4] * 2)
    assert torch.equal(loader.dataset.tensors[0], images)


def test_a_write_to_the_dataset_is_seen_at_once():
    loader = DataLoader(whole(), batch_size=4)
    applied = applied_to(loader)
    for _ in range(2):
        for number, (x, _, _) in enumerate(loader):
            x.to("cpu")
            if number == 5:
                loader.dataset.tensors[0].add_(1)
    assert torch.equal(next(iter(loader))[0].to("cpu"), tensors()[0][:4].add_(1).add_(1))
    assert "changed" in applied.effect().reason and not applied.problem


def test_a_write_behind_its_back_is_seen_at_the_next_epoch_and_marks_the_run():
    loader = DataLoader(whole(), batch_size=4)
    applied = applied_to(loader)
    for x, _, _ in loader:
        x.to("cpu")
    loader.dataset.tensors[0].numpy()[:] = 7.0
    assert next(iter(loader))[0].to("cpu").unique().tolist() == [7.0]
    assert "changed" in applied.problem


def test_a_batch_read_after_a_write_to_the_dataset_marks_the_run():
    loader = DataLoader(whole(), batch_size=4)
    applied = applied_to(loader)
    x = next(iter(loader))[0]
    loader.dataset.tensors[0].add_(1)
    x.sum()
    assert "changed" in applied.problem


def test_another_tensor_in_the_dataset_is_seen_at_once():
    loader = DataLoader(whole(), batch_size=4)
    applied = applied_to(loader)
    iterator = iter(loader)
    next(iterator)[0].to("cpu")
    loader.dataset.tensors = tuple(item.flip(0) for item in loader.dataset.tensors)
    assert next(iterator)[1].tolist() == [43, 42, 41, 40]
    assert "changed" in applied.effect().reason


def test_what_does_not_fit_stays_on_the_cpu():
    loader = DataLoader(whole(), batch_size=4)
    size = 48 * 3 * 4 * 4 * 4
    applied = applied_to(loader, free=4 * size - 1)
    for batch in loader:
        batch[0].to("cpu")
    assert "free on the device" in applied.effect().reason and applied._resident.served == 0
    other = DataLoader(whole(), batch_size=4)
    fits = applied_to(other, free=4 * size)
    for batch in other:
        batch[0].to("cpu")
    assert fits.effect() is None and fits._resident.bytes == size


def test_indices_that_are_none_are_left_to_the_stock_fetcher():
    loader = DataLoader(whole(), batch_sampler=[[0, 1], [-1, 2], [99]])
    applied_to(loader)
    iterator = iter(loader)
    assert next(iterator)[1].tolist() == [0, 1]
    assert next(iterator)[1].tolist() == [47, 2]
    with pytest.raises(IndexError):
        next(iterator)


def test_a_dataset_made_anew_is_not_kept():
    loader = DataLoader(whole(), batch_size=4)
    applied = applied_to(loader)
    for x, _, _ in loader:
        x.to("cpu")
    gone = weakref.ref(loader.dataset)
    del loader, x
    gc.collect()
    assert gone() is None and not applied._resident._copies and applied.effect() is None


def test_close_gives_everything_back():
    loader = DataLoader(whole(), batch_size=4)
    applied = applied_to(loader)
    list(loader)
    applied.close()
    applied.close()
    assert "_get_iterator" not in vars(loader) and type(next(iter(loader))[0]) is torch.Tensor
    assert loader.dataset not in [item._dataset() for item in device_dataset._RESIDENTS.values()]


class Mine(TensorDataset):
    def __getitem__(self, index):
        return tuple(item[index] * 2 for item in self.tensors)


@pytest.mark.parametrize(
    ("dataset", "more", "why"),
    [
        (Mine(*tensors()), {}, "not a TensorDataset"),
        (TensorDataset(torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)), {}, "contiguous"),
        (TensorDataset(torch.randn(8, 2, requires_grad=True)), {}, "plain"),
        (whole(), {"num_workers": 2}, "worker"),
        (whole(), {"collate_fn": lambda samples: samples}, "collate"),
        (whole(), {"batch_size": None}, "batched"),
    ],
)
def test_refusals(dataset, more, why):
    assert why in refusal(DataLoader(dataset, **more))


def test_check():
    facts = {"name": "DataLoader", "training": True, "batch_size": 8, "samples": 64, "iterable": False}
    plain = LoaderFacts(dataset="TensorDataset", workers=0, **facts)
    assert TECHNIQUE.check(measurement(device="cuda:0", loaders=(plain,))).gain > 1.0
    assert not TECHNIQUE.check(measurement(loaders=(plain,))).applies
    working = LoaderFacts(dataset="TensorDataset", workers=2, **facts)
    assert not TECHNIQUE.check(measurement(device="cuda:0", loaders=(working,))).applies
    if not torch.backends.cuda.is_built():
        assert isinstance(TECHNIQUE.at(LoaderReady(loader=DataLoader(whole())), {"share": 0.25}), NoEffect)


@pytest.mark.cuda
def test_on_cuda_training_is_the_same_to_the_bit():
    def train(resident):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 64), torch.nn.Dropout(0.1)).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loader = DataLoader(whole(256), batch_size=16, shuffle=True, pin_memory=True)
        applied = TECHNIQUE.at(LoaderReady(loader=loader), {"share": 0.25}) if resident else None
        for _ in range(3):
            for x, y, _ in loader:
                optimizer.zero_grad()
                y = y.to("cuda", non_blocking=True) % 64
                torch.nn.functional.cross_entropy(net(x.to("cuda", non_blocking=True)), y).backward()
                optimizer.step()
        assert applied is None or (applied.effect() is None and applied._resident.served > 0)
        return [item.tolist() for item in net.parameters()]

    assert train(False) == train(True)
