"""A dataset of tensors that fits is kept on the GPU, and batches are gathered there.

Idea. A `TensorDataset` is read sample by sample in Python, stacked, and copied to the device, every epoch anew. Its
tensors are in memory already: one copy of them on the device makes a batch one gather, and only indices travel.

Numbers. Sampler, order and random draws are the script's own; a gather moves bits. What the script gets stays a CPU
tensor to it (`sites.twins`), gathered on the CPU only where it asks for more than `.to(device)`.

Limits. `TensorDataset` itself, and `Subset` of it, with contiguous tensors, read in the training process, with the
default collate function. The tensors go to the device after `AFTER` batches, when the training has taken the memory it
needs, and only if they fit into a stated share of what is then free. A change of the tensors through PyTorch is noticed
at once; one behind its back (numpy) at the next epoch, which marks the run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from upshift import units
from upshift.measure.constancy import difference, fingerprint
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites.iterators import IteratorHook, taken, unsuited
from upshift.sites.moments import LoaderReady, Moment
from upshift.sites.protocol import BaseApplied, Card, NoEffect, Numerics, SettingSpec, Verdict
from upshift.sites.twins import movable, twin

if TYPE_CHECKING:
    import torch

#: Batches before the tensors are moved: by then gradients, optimizer state and activations have been allocated.
AFTER = 8

#: Datasets whose tensors are found, by class name.
KINDS = ("TensorDataset", "Subset")

_CLOSED, _GONE = "closed", "the dataset is gone"

#: Bytes free on a device, of what the whole process has not reserved.
FreeBytes = Callable[[Any], int]


def free_on_cuda(device: torch.device) -> int:
    """Bytes free on a CUDA device; what the caching allocator holds counts as taken."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def tensors_of(dataset: Any) -> tuple[tuple[torch.Tensor, ...], list[Any]] | None:
    """The tensors a dataset reads its samples from, and the index lists on the way to them, outermost first."""
    from torch.utils.data import Subset, TensorDataset

    lists = []
    while type(dataset) is Subset:
        lists.append(dataset.indices)
        dataset = dataset.dataset
    return (dataset.tensors, lists) if type(dataset) is TensorDataset else None


class Resident:
    """The tensors of one dataset, and their copies on the device the script moves its batches to.

    `reason` is set once it is out of use; `problem` as well if stale samples may have been served.
    """

    def __init__(self, dataset: Any, share: float, kind: str, free: FreeBytes) -> None:
        found = tensors_of(dataset)
        assert found is not None
        self.tensors, self.lists = found
        # Weak: a script may build its dataset anew each epoch.
        self._dataset = weakref.ref(dataset, self._gone)
        self.kind = kind
        self.reason = self.problem = ""
        self.batches = self.served = 0
        self.bytes = 0
        self._share, self._free = share, free
        self._copies: dict[tuple[int, Any], torch.Tensor] = {}
        self._print = fingerprint(dataset)
        self._versions = self._state()

    def _state(self) -> tuple[Any, ...]:
        return tuple((id(item), item._version, item.data_ptr(), item.shape) for item in self.tensors)

    def _gone(self, _: Any) -> None:
        self.drop(_GONE)
        self.tensors, self.lists = (), []

    def serves(self, dataset: Any) -> bool:
        """Whether it is resident for this very dataset."""
        return self._dataset() is dataset and not self.reason

    def drop(self, reason: str, *, problem: bool = False) -> None:
        """Out of use for good; the copies are freed."""
        self.reason = self.reason or reason
        if problem:
            self.problem = self.problem or reason
        self._copies.clear()

    def same(self) -> bool:
        """Whether the tensors are those that were copied, as far as PyTorch knows."""
        found = tensors_of(self._dataset())
        if found is None or found[0] is not self.tensors or self._state() != self._versions:
            self.drop("the script has changed the dataset's tensors")
        return not self.reason

    def same_bytes(self) -> bool:
        """Whether they hold what they held (in full up to 1 MiB a tensor, sampled beyond). Between epochs."""
        if self.same() and (changed := difference(self._print, fingerprint(self._dataset()))):
            self.drop(f"the dataset changed between epochs ({changed})", problem=bool(self.served))
        return not self.reason

    def copy(self, number: int, device: torch.device) -> torch.Tensor | None:
        """Tensor `number` on `device`, brought there if it is time and it fits; None where it is not."""
        if self.reason or device.type != self.kind:
            return None
        known = self._copies.get((number, device))
        if known is not None or self.batches <= AFTER:
            return known
        tensor = self.tensors[number]
        size, free = tensor.numel() * tensor.element_size(), self._free(device)
        # A share of what was free before the first of these tensors came.
        if self.bytes + size > self._share * (free + self.bytes):
            self.drop(
                f"{units.binary(self.bytes + size)} are more than {units.percent(self._share)} of the "
                f"{units.binary(free + self.bytes)} free on the device"
            )
            return None
        self._copies[number, device] = tensor.to(device)
        self.bytes += size
        return self._copies[number, device]


class _Rows:
    """The indices of one batch, and their copies on devices."""

    def __init__(self, keys: list[int]) -> None:
        import torch

        self.keys = torch.tensor(keys, dtype=torch.int64, device="cpu")
        self._there: dict[Any, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        found = self._there.get(device)
        if found is None:
            keys = self.keys.pin_memory() if device.type == "cuda" else self.keys
            found = self._there[device] = keys.to(device, non_blocking=True)
        return found


class Gathered:
    """Rows of one tensor: gathered where they are asked for. See `sites.twins.Source`."""

    def __init__(self, resident: Resident, number: int, rows: _Rows) -> None:
        self.opened = False
        self._resident, self._number, self._rows = resident, number, rows
        self._tensor = resident.tensors[number]
        self._version = self._tensor._version
        self._host: torch.Tensor | None = None

    def host(self) -> torch.Tensor:
        """The rows on the CPU."""
        self.opened = True
        if self._host is None:
            if self._tensor._version != self._version:
                self._resident.drop("the script has changed the dataset before it used a batch of it", problem=True)
            self._host = self._tensor.index_select(0, self._rows.keys)
        return self._host

    def there(self, device: torch.device) -> torch.Tensor | None:
        """The rows on the device."""
        copy = self._resident.copy(self._number, device)
        if copy is None:
            return None
        self._resident.served += 1
        return copy.index_select(0, self._rows.on(device))


class DeviceFetcher:
    """Stands for the fetcher of one iterator; everything it does not know is asked of the stock one."""

    def __init__(self, stock: Any, resident: Resident) -> None:
        self._stock, self._resident = stock, resident

    def fetch(self, index: Any) -> Any:
        """The next batch: a list of tensors, as `default_collate` makes of tuples."""
        resident = self._resident
        keys = self._keys(index) if resident.same() else None
        if keys is None:
            return self._stock.fetch(index)
        resident.batches += 1
        rows = _Rows(keys)
        return [
            twin(Gathered(resident, number, rows), tensor, (len(keys), *tensor.shape[1:]))
            for number, tensor in enumerate(resident.tensors)
        ]

    def _keys(self, index: Any) -> list[int] | None:
        """Rows of the tensors; None where these are no plain indices, which the stock fetcher then judges."""
        resident = self._resident
        try:
            keys = [int(item) for item in index]
            for indices in resident.lists:
                keys = [int(indices[item]) for item in keys]
        except (TypeError, ValueError, IndexError):
            return None
        length = len(resident.tensors[0])
        return keys if keys and min(keys) >= 0 and max(keys) < length else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


#: id(dataset) -> what is resident of it: a loader built anew each epoch finds it again.
_RESIDENTS: dict[int, Resident] = {}


def resident_of(dataset: Any, share: float, kind: str, free: FreeBytes) -> Resident:
    """What is resident of a dataset, in this process."""
    known = _RESIDENTS.get(id(dataset))
    if known is None or not known.serves(dataset):
        known = _RESIDENTS[id(dataset)] = Resident(dataset, share, kind, free)
    return known


class DeviceDatasetApplied(BaseApplied):
    """A loader whose batches are gathered on the device."""

    def __init__(self, loader: Any, resident: Resident) -> None:
        self._resident = resident
        size = sum(item.numel() * item.element_size() for item in resident.tensors)
        self.note = f"{len(loader.dataset)} samples ({units.binary(size)}) are kept on the device after {AFTER} batches"
        self._hook = IteratorHook(loader, self._exchange)

    def _exchange(self, iterator: Any) -> None:
        from torch.utils.data._utils.fetch import _MapDatasetFetcher

        stock = getattr(iterator, "_dataset_fetcher", None)
        if type(stock) is not _MapDatasetFetcher or not self._resident.serves(stock.dataset):
            return
        if not unsuited(stock.collate_fn, stock.auto_collation) and self._resident.same_bytes():
            iterator._dataset_fetcher = DeviceFetcher(stock, self._resident)
            iterator._pin_memory = False  # there is nothing to pin: only indices travel

    @property
    def problem(self) -> str:
        """What may have gone wrong in the results, or the empty string. Not empty: the run must not count as a win."""
        return self._resident.problem

    def effect(self) -> NoEffect | None:
        """No effect while no batch was gathered on the device."""
        resident = self._resident
        if resident.reason not in ("", _CLOSED, _GONE):
            return NoEffect(f"the copy on the device was dropped: {resident.reason}")
        if not resident.served:
            return NoEffect(f"no batch after the first {AFTER} was moved to a CUDA device as it came from the loader")
        return None

    def close(self) -> None:
        """The loader is as it was, and the device's memory free."""
        self._hook.remove()
        self._resident.drop(_CLOSED)
        for key in [key for key, value in _RESIDENTS.items() if value is self._resident]:
            del _RESIDENTS[key]


def refusal(loader: Any) -> str:
    """Why the dataset of this loader cannot be kept on a device, or the empty string."""
    from torch.utils.data import DataLoader

    found = tensors_of(loader.dataset)
    if found is None:
        return "it is not a TensorDataset, nor a Subset of one"
    if loader.num_workers > 0:
        return f"it is read in {loader.num_workers} worker processes"
    if type(loader)._get_iterator is not DataLoader._get_iterator or taken(loader):
        return "something else already stands in for its iterators"
    if not found[0] or not all(movable(item) and item.is_contiguous() for item in found[0]):
        return "its tensors are not all plain, contiguous and on the CPU"
    return unsuited(loader.collate_fn, loader._auto_collation)


class DeviceDataset:
    """Keep a `TensorDataset` on the GPU."""

    card: ClassVar[Card] = Card(
        name="device_dataset",
        summary="keep a dataset of tensors on the GPU and gather batches there",
        source="torch.utils.data.TensorDataset; KellerJordan/cifar10-airbench (a loader that lives on the GPU)",
        sites=("loader_ready",),
        numerics=Numerics.BITWISE,
        switchable="process",
        targets=("data", "h2d", "sync"),
        details=(
            "Acts on TensorDataset and Subset of it, with num_workers=0 and the default collate function, where the "
            f"script moves batches with .to(device). The copy is made after {AFTER} batches, if it fits."
        ),
        settings={
            "share": SettingSpec(0.25, "of the device memory then free, what the dataset may take", low=0.01, high=0.9)
        },
        conflicts=("cache", "loader", "prefetch"),
        tested_on=(),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """The same bits, gathered elsewhere."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies where training on CUDA reads a TensorDataset in its own process and waits for it."""
        facts = seen.facts
        if not facts.device.startswith("cuda"):
            return Verdict(False, f"the training runs on {facts.device}")
        loaders = [item for item in facts.loaders if item.training and not item.workers and item.dataset in KINDS]
        if not loaders:
            return Verdict(False, "no training DataLoader reads a TensorDataset in the training process")
        share = seen.anatomy.share("data") + seen.anatomy.share("h2d")
        if any(phase.name == "data" and phase.share.known for phase in seen.anatomy.phases) and share < 0.01:
            return Verdict(False, f"waiting for data and copying it is only {units.percent(share)} of the step")
        return Verdict(
            True,
            "samples are read one by one, stacked and copied, every epoch anew",
            gain=1.0 / (1.0 - 0.9 * min(share, 1.0)) if share else None,
            rests_on=f"waiting and copying, {units.percent(share)} of the step, of which a tenth stays"
            if share
            else "",
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> DeviceDatasetApplied | NoEffect | None:
        """Stand in for the iterators of a loader."""
        if not isinstance(moment, LoaderReady):
            return None
        import torch

        loader = moment.loader
        # Whether a device is in use is seen when a batch is moved.
        if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            return NoEffect("this PyTorch was built without CUDA")
        if why := refusal(loader):
            return NoEffect(f"{type(loader.dataset).__name__}: {why}")
        resident = resident_of(loader.dataset, float(settings["share"]), "cuda", free_on_cuda)
        return DeviceDatasetApplied(loader, resident)
