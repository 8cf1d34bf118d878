"""Batches are copied to the GPU from page-locked memory, on a stream of their own, before the script asks for them.

Idea. `batch.to("cuda")` from ordinary memory makes the host wait until the copy has run, behind all work queued before
it. From page-locked (pinned) memory and on another stream, the copy runs beside that work (NVIDIA, CUDA C++ Best
Practices Guide, 9.1). The script's own `.to(device)` then only lets its stream wait for the copy.

What the script gets from the loader stays a CPU tensor to it (`sites.twins`); where it sends a batch is learned from
the first ones. Where worker processes read and the order of samples is PyTorch's own, the next batch is fetched and
sent one step early. Reading in the training process is not moved: its random draws would fall elsewhere.

Limits. One more batch of device memory, and of pinned memory. A batch that is changed on the CPU before it is moved
goes the ordinary way. Nothing is gained where the device never waits for copies.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from upshift import units
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites.iterators import IteratorHook, taken
from upshift.sites.moments import LoaderReady, Moment
from upshift.sites.protocol import BaseApplied, Card, NoEffect, Numerics, Verdict
from upshift.sites.twins import movable, replaced, twin

if TYPE_CHECKING:
    import torch

#: A place in the batch whose copy was in vain this often is no longer sent.
IN_VAIN = 3


class Sent(Protocol):
    """A copy under way."""

    def take(self) -> torch.Tensor:
        """The copy, for work queued on the current stream from now on."""

    def wait(self) -> None:
        """Return when the copy has been made."""


class Lane(Protocol):
    """A way to a device."""

    kind: str

    def send(self, host: torch.Tensor, device: torch.device) -> Sent:
        """Begin to copy `host` to `device`."""


class _CudaSent:
    def __init__(self, there: torch.Tensor, event: torch.cuda.Event) -> None:
        self._there, self._event = there, event

    def take(self) -> torch.Tensor:
        import torch

        current = torch.cuda.current_stream(self._there.device)
        current.wait_event(self._event)
        # Allocated on the lane's stream: its memory must not be used again before the current one is done with it.
        self._there.record_stream(current)
        return self._there

    def wait(self) -> None:
        self._event.synchronize()


class CudaLane:
    """One stream per device, from pinned memory."""

    kind = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, host: torch.Tensor, device: torch.device) -> _CudaSent:
        """Begin to copy `host` to `device`; ordinary memory is first copied to pinned memory, which waits for none."""
        import torch

        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pinned = host if host.is_pinned() else host.pin_memory()
        with torch.cuda.stream(stream):
            there = pinned.to(device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return _CudaSent(there, event)


class Place:
    """One tensor's place in the batches of a loader: where the script sends it, and what came of that."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.served = self.in_vain = 0

    @property
    def wanted(self) -> torch.device | None:
        """Where to send the next one, if anywhere."""
        return None if self.in_vain >= IN_VAIN and not self.served else self.device


class Staged:
    """A batch's tensor on the CPU, and its copy under way. See `sites.twins.Source`."""

    def __init__(self, host: torch.Tensor, place: Place, lane: Lane) -> None:
        self.opened = False
        self._host, self._place, self._kind = host, place, lane.kind
        self._device = place.wanted
        self._sent = None if self._device is None else lane.send(host, self._device)
        self._left = self._sent is not None

    def host(self) -> torch.Tensor:
        """The CPU tensor; a copy still under way is waited for, since what follows may write to it."""
        if self._sent is not None and not self.opened:
            self._sent.wait()
        self.opened = True
        if self._left:
            self._left = False
            self._place.in_vain += 1
        return self._host

    def there(self, device: torch.device) -> torch.Tensor | None:
        """The copy, the first time it is asked for; where it was wanted is remembered for the next batches."""
        if device.type != self._kind:
            return None
        self._place.device = device
        if self._sent is None or not self._left or device != self._device:
            return None
        self._left = False
        self._place.served += 1
        return self._sent.take()


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


class Ahead:
    """Stands for `_next_data` of one iterator: sends each batch, and with `early` the next one as well."""

    def __init__(self, iterator: Any, places: defaultdict[int, Place], lane: Lane, early: bool) -> None:
        # Weak: an iterator ends its workers when its last reference goes.
        self._iterator = weakref.ref(iterator)
        self._places, self._lane, self._early = places, lane, early
        self._next: Any = None

    def __call__(self) -> Any:
        iterator: Any = self._iterator()
        if not iterator._num_yielded:
            self._next = None  # another pass over the data; what was fetched for the last one is void
        now = self._read(iterator) if self._next is None else self._next
        self._next = None
        if isinstance(now, _Raised):
            error = now.error
            now = None
            try:
                raise error
            finally:
                del error  # a frame that keeps its own exception would keep the iterator and its workers
        if self._early:
            self._next = self._read(iterator)
        return now

    def _read(self, iterator: Any) -> Any:
        import torch

        try:
            batch = type(iterator)._next_data(iterator)
        except Exception as error:  # also the end of the pass: raised when its turn comes
            return _Raised(error)
        number = -1

        def staged(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal number
            number += 1
            return twin(Staged(tensor, self._places[number], self._lane), tensor) if movable(tensor) else tensor

        return replaced(batch, staged, torch.Tensor)


def in_stock_order(loader: Any) -> bool:
    """Whether the order of samples is PyTorch's own, which draws nothing between two batches."""
    from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

    inner = getattr(loader.batch_sampler, "sampler", None)
    return type(loader.batch_sampler) is BatchSampler and type(inner) in (
        DistributedSampler,
        RandomSampler,
        SequentialSampler,
    )


class PrefetchApplied(BaseApplied):
    """A loader whose batches are sent ahead."""

    def __init__(self, loader: Any, lane: Lane) -> None:
        early = loader.num_workers > 0 and in_stock_order(loader)
        self.places: defaultdict[int, Place] = defaultdict(Place)
        self.note = "batches go to the device from pinned memory on a stream of their own"
        self.note += ", one step early" if early else ""

        def exchange(iterator: Any) -> None:
            iterator._next_data = Ahead(iterator, self.places, lane, early)

        self._hook = IteratorHook(loader, exchange)
        self._used = self.places.values()

    def effect(self) -> NoEffect | None:
        """No effect where the script moves no batch as it came from the loader."""
        if any(place.served for place in self._used):
            return None
        if any(place.in_vain for place in self._used):
            return NoEffect("the script changes its batches on the CPU before it moves them")
        return NoEffect("no batch was moved to a CUDA device as it came from the loader")

    def close(self) -> None:
        """Iterators built from now on are the stock ones."""
        self._hook.remove()


class Prefetch:
    """Send batches to the GPU ahead of the script's own `.to(device)`."""

    card: ClassVar[Card] = Card(
        name="prefetch",
        summary="copy batches to the GPU from pinned memory, beside the computation",
        source="CUDA C++ Best Practices Guide, 9.1; https://docs.pytorch.org/docs/stable/notes/cuda.html#use-pinned-memory-buffers",
        sites=("loader_ready",),
        numerics=Numerics.BITWISE,
        switchable="process",
        targets=("data", "h2d", "sync"),
        details=(
            "Acts on the batches of DataLoaders that the script moves with .to(device) or .cuda(). Until then they are "
            "CPU tensors to the script. Needs memory for one more batch on the device and in pinned memory."
        ),
        conflicts=("cache",),
        tested_on=(),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """The same bits, copied at another time."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies to training on CUDA from a DataLoader, unless copies are known to cost nothing."""
        facts = seen.facts
        if not facts.device.startswith("cuda"):
            return Verdict(False, f"the training runs on {facts.device}; nothing is copied to a GPU")
        if not any(item.training for item in facts.loaders):
            return Verdict(False, "no training DataLoader was seen")
        known = {phase.name for phase in seen.anatomy.phases if phase.share.known}
        share = seen.anatomy.share("h2d")
        if "h2d" in known and share < 0.005:
            return Verdict(False, f"copies to the device are only {units.percent(share)} of the step")
        return Verdict(
            True,
            "batches are copied to the device while it waits",
            gain=1.0 / (1.0 - min(share, 0.9)) if share else None,
            rests_on=f"copies to the device, {units.percent(share)} of the step, hidden entirely" if share else "",
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> PrefetchApplied | NoEffect | None:
        """Stand in for the iterators of a loader."""
        if not isinstance(moment, LoaderReady):
            return None
        import torch

        # Whether a device is in use is seen when a batch is moved.
        if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            return NoEffect("this PyTorch was built without CUDA")
        if why := refusal(moment.loader):
            return NoEffect(f"{type(moment.loader.dataset).__name__}: {why}")
        return PrefetchApplied(moment.loader, CudaLane())


def refusal(loader: Any) -> str:
    """Why the batches of this loader cannot be sent ahead, or the empty string."""
    from torch.utils.data import DataLoader

    if type(loader)._get_iterator is not DataLoader._get_iterator:
        return "its class builds iterators of its own"
    if taken(loader):
        return "something else already stands in for its iterators"
    if not loader._auto_collation:
        return "it is not batched by the loader (batch_size=None)"
    return ""
