"""Read batches ahead in worker processes, by changing the arguments with which the script builds its loaders.

Idea. With `num_workers=0` the step waits while each batch is read. Workers read ahead while the model computes; the
batches arrive in the same order. The bound on the gain is perfect overlap.

Numbers. The order of samples is the script's own: the sampler stays in the training process and draws what it drew.
Where the dataset draws no random numbers the batches are bit for bit the same; where it does (augmentation), the draws
come from the workers' streams: another seed of the same distribution. The technique cannot know which, so it says
`reseeds`; equal losses in the trial show the stronger kind. With `persistent` an epoch would skip the draw of a base
seed and so shift the shuffle; the draw is made up for.

A sampler whose `__iter__` draws at once, instead of when it is iterated, is asked twice by a loader with workers (torch
makes the iterator again in `_reset`): its order is another draw of the same distribution.

Limits. Every loader with enough batches gets the workers, evaluation too, since nothing tells them apart when they are
built. Libraries that hold thread pools or locks in the training process may not survive a fork; such a trial hangs and
is lost. A loader with `persistent` workers cannot be pickled or deep-copied once it was iterated (PyTorch's own limit).
A sample is read once, with the random streams and the dataset's own attributes put back, to know its size.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import sys
import types
import weakref
from pathlib import Path
from typing import Any, ClassVar

from upshift import units
from upshift.hardware import machine
from upshift.measure.constancy import difference, fingerprint, generators, streams_kept, tensors
from upshift.measure.samples import memory_free
from upshift.records.measurement import LoaderFacts, Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites.moments import LoaderArgs, LoaderReady, Moment
from upshift.sites.protocol import BaseApplied, Card, NoEffect, Numerics, SettingSpec, Verdict

#: A loader with fewer batches than this per worker is not worth starting processes for, each epoch anew.
BATCHES_PER_WORKER = 4

#: Memory a worker takes besides its batches: written pages of a forked process, or a fresh interpreter with torch.
FORKED_BYTES, SPAWNED_BYTES = 64 * 2**20, 400 * 2**20

#: A dataset that does not pickle to less than this is not sent to spawned workers.
PICKLE_BYTES = 256 * 2**20

SHM = Path("/dev/shm")


class _Counter:
    """A file that only counts, and gives up beyond a limit."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        if self.size > PICKLE_BYTES:
            raise OverflowError(f"more than {units.binary(PICKLE_BYTES)}")
        return len(data)


def start_method(context: Any) -> str:
    """How workers would be started (`fork`, `spawn`, `forkserver`), without fixing the default as a side effect."""
    if isinstance(context, str):
        return context
    if context is not None:
        return str(context.get_start_method())
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def nested_bytes(item: Any) -> tuple[int, bool]:
    """Bytes of the tensors and arrays in a nested sample, and whether one of them is on an accelerator."""
    import torch

    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size(), item.device.type != "cpu"
    if hasattr(item, "nbytes"):
        return int(item.nbytes), False
    if isinstance(item, (str, bytes)):
        return len(item), False
    parts = item.values() if hasattr(item, "values") else item if isinstance(item, (list, tuple)) else ()
    sizes = [nested_bytes(part) for part in parts]
    return sum(size for size, _ in sizes) if sizes else 8, any(there for _, there in sizes)


def sample_bytes(dataset: Any) -> tuple[int, bool]:
    """Bytes of sample 0, and whether it lies on an accelerator; the random streams and attributes are put back.

    Attributes are put back because a file opened by this read must not be shared with forked workers.
    """
    owners = []
    inner: Any = dataset
    for _ in range(8):
        if not isinstance(getattr(inner, "__dict__", None), dict):
            break
        owners.append((inner.__dict__, dict(inner.__dict__)))
        inner = inner.__dict__.get("dataset")
    try:
        with streams_kept(generators(dataset)):
            return nested_bytes(dataset[0])
    finally:
        for now, before in owners:
            now.clear()
            now.update(before)


def forecast(workers: int, prefetch: int, batch_bytes: int, each: int) -> tuple[int, int]:
    """Bytes of shared memory and of all memory that workers need: `prefetch` batches each and one in the making."""
    shared = workers * (prefetch + 1) * batch_bytes
    return shared, shared + workers * each


def obstacle(args: dict[str, Any], workers: int, prefetch: int, main_guard: bool) -> str:
    """Why a loader with these arguments must not get `workers` processes, or the empty string."""
    dataset = args.get("dataset")
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return "the dataset has no length"
    batches = _batches(args, count)
    if batches < BATCHES_PER_WORKER * workers:
        return f"{batches} batches are too few for {workers} workers that start anew each epoch"
    if multiprocessing.current_process().daemon:
        return "a daemonic process may not have workers"
    method, each = start_method(args.get("multiprocessing_context")), FORKED_BYTES
    if method == "fork":
        if any(getattr(getattr(item, "device", None), "type", "cpu") == "cuda" for item in tensors(dataset)):
            return "the dataset holds CUDA tensors, which a forked worker cannot use"
    else:
        if not main_guard:
            return f"workers would be started by {method}, which runs a script without a __main__ guard again"
        try:
            counter = _Counter()
            pickle.Pickler(counter).dump((dataset, args.get("collate_fn"), args.get("worker_init_fn")))
        except Exception as error:
            return f"the dataset cannot be sent to a worker started by {method}: {type(error).__name__}: {error}"
        each = SPAWNED_BYTES + counter.size
    return _no_room(args, workers, prefetch, each)


def _batches(args: dict[str, Any], count: int) -> int:
    if args.get("batch_sampler") is not None:
        try:
            return len(args["batch_sampler"])
        except (TypeError, NotImplementedError):
            return count
    size = args.get("batch_size", 1)
    return -(-count // size) if size else count


def _batch_size(args: dict[str, Any]) -> int:
    """Samples a batch: as said, or on average."""
    sampler = args.get("batch_sampler")
    size = args.get("batch_size", 1) if sampler is None else getattr(sampler, "batch_size", None)
    if isinstance(size, int):
        return size
    count = len(args["dataset"])
    return 1 if sampler is None else -(-count // max(1, _batches(args, count)))


def _no_room(args: dict[str, Any], workers: int, prefetch: int, each: int) -> str:
    try:
        one, accelerator = sample_bytes(args["dataset"])
    except Exception as error:
        return f"a sample could not be read to know its size: {type(error).__name__}: {error}"
    if accelerator:
        return "samples are on an accelerator; workers would have to share its memory"
    size = _batch_size(args)
    shared, total = forecast(workers, prefetch, one * size, each)
    wanted = f"{workers} workers with {prefetch} batches of {units.binary(one * size)} ahead"
    if SHM.is_dir() and shared > (free := shutil.disk_usage(SHM).free) // 2:
        return f"{wanted} need {units.binary(shared)} of shared memory; /dev/shm has {units.binary(free)} free"
    if total > (free := memory_free()) // 2:
        return f"{wanted} need {units.binary(total)}; {units.binary(free)} of memory are free"
    return ""


class LoaderApplied(BaseApplied):
    """Arguments that were changed while a loader was built; there is nothing to undo on a loader already built."""

    def __init__(self, note: str) -> None:
        self.note = note


class Persistence(BaseApplied):
    """Keeps the workers of one loader between epochs, as long as that changes nothing.

    A fresh set of workers is started, as the stock loader would, when the dataset has changed since the workers copied
    it, or when the last pass was not read to its end (its iterator may still be in use).
    """

    def __init__(self, loader: Any) -> None:
        self._loader = weakref.ref(loader)
        self.kept = self.restarted = 0
        self.reason = ""
        self._print: dict[str, tuple[Any, ...]] = {}
        object.__setattr__(loader, "persistent_workers", True)
        loader._get_iterator = self
        self.note = "workers stay between epochs; a change of the dataset's attributes restarts them"

    def __call__(self) -> Any:
        caller: Any = sys._getframe(1).f_locals.get("self")
        loader = self._loader()
        if loader is None or (caller is not loader and "_get_iterator" in getattr(caller, "__dict__", {})):
            return type(caller)._get_iterator(caller)  # a shallow copy of the loader
        return self._start(loader)

    def _start(self, loader: Any) -> Any:
        self._print = fingerprint(loader.dataset)
        iterator = type(loader)._get_iterator(loader)
        if hasattr(iterator, "_reset"):
            ours = weakref.ref(iterator)

            def reset(of: Any, first_iter: bool = False) -> None:
                self._again(ours(), of, first_iter)

            # The stock constructor has used the stock method; from here on a call means another epoch.
            iterator._reset = reset
        return iterator

    def _again(self, iterator: Any, loader: Any, first_iter: bool) -> None:
        import torch

        mine: Any = self._loader()
        if loader is not mine:  # a shallow copy of the loader: what it would have had
            loader._iterator = type(loader)._get_iterator(loader)
            return
        changed = difference(self._print, fingerprint(loader.dataset))
        if changed or not _exhausted(iterator):
            self.restarted += 1
            self.reason = self.reason or (f"the dataset changed ({changed})" if changed else "a pass was cut short")
            # The old workers end with the last reference to their iterator, which someone may still be reading.
            loader._iterator = self._start(loader)
            return
        self.kept += 1
        # Without persistence every epoch draws a base seed for its workers; the shuffle comes after it.
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=loader.generator)
        type(iterator)._reset(iterator, loader, first_iter)

    def effect(self) -> NoEffect | None:
        """No effect while every epoch had to start its workers anew."""
        if self.restarted and not self.kept:
            return NoEffect(f"workers were started anew each epoch: {self.reason}")
        return None

    def close(self) -> None:
        """The loader is as it was: the next epoch starts workers of its own."""
        loader = self._loader()
        if loader is None or vars(loader).get("_get_iterator") is not self:
            return
        del loader._get_iterator
        object.__setattr__(loader, "persistent_workers", False)
        loader._iterator = None

    def __reduce__(self) -> Any:
        return _stock_getter, (self._loader(),)


def _stock_getter(loader: Any) -> Any:
    return types.MethodType(type(loader)._get_iterator, loader)


def _exhausted(iterator: Any) -> bool:
    """Whether every batch asked of the workers was delivered and none is left to ask for."""
    sent, received = getattr(iterator, "_send_idx", None), getattr(iterator, "_rcvd_idx", None)
    return sent is not None and sent == received and not getattr(iterator, "_task_info", True)


class Loader:
    """Give the script's loaders worker processes, a prefetch depth, and on CUDA pinned memory."""

    card: ClassVar[Card] = Card(
        name="loader",
        summary="read batches ahead in worker processes",
        source="https://docs.pytorch.org/docs/stable/data.html#multi-process-data-loading",
        sites=("loader_args", "loader_ready"),
        numerics=Numerics.RESEEDS,
        switchable="process",
        targets=("data", "h2d"),
        details=(
            "Changes num_workers, prefetch_factor, persistent_workers and pin_memory of map-style loaders as the "
            "script builds them; sampler, batch sampler, collate function, generator and worker initialiser stay. "
            "Never touches an IterableDataset. Where the dataset draws no random numbers the batches are the same "
            "bits; that is not known before, so it is held to less."
        ),
        settings={
            "workers": SettingSpec(2, "worker processes per loader; 0 reads in the training process", low=0, high=64),
            "prefetch": SettingSpec(2, "batches each worker reads ahead", low=1, high=64),
            "persistent": SettingSpec(False, "keep the workers between epochs while the dataset does not change"),
            "pin": SettingSpec(False, "page-locked batches for faster copies to the device; CUDA only"),
        },
        conflicts=("cache",),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """`reseeds`: whether the dataset draws random numbers is not known before it ran."""
        return Numerics.RESEEDS

    def check(self, seen: Measurement) -> Verdict:
        """Applies where training waits for a map-style loader; candidates are worker counts up to the cores."""
        loaders = [item for item in seen.facts.loaders if item.training]
        if not loaders:
            return Verdict(False, "no training DataLoader was seen")
        plain = [item for item in loaders if not item.iterable]
        if not plain:
            return Verdict(False, "workers would double the data of an IterableDataset")
        largest = max(plain, key=lambda item: item.samples or 0)
        cores = seen.facts.cores or machine.usable_cores()
        cuda = seen.facts.device.startswith("cuda")
        share = seen.anatomy.share("data")
        known = any(phase.name == "data" and phase.share.known for phase in seen.anatomy.phases)
        pin = cuda and not largest.pinned and seen.anatomy.share("h2d") >= 0.02
        if known and share < 0.02:
            if largest.workers > cores:
                fewer: dict[str, Setting] = {"workers": cores}
                return Verdict(True, f"{largest.workers} workers on {cores} cores", candidates=(fewer,))
            if not pin:
                return Verdict(False, f"waiting for data is only {units.percent(share)} of the step")
        counts = [count for count in _counts(cores) if count != largest.workers]
        if largest.samples and largest.batch_size:
            batches = -(-largest.samples // largest.batch_size)
            counts = [count for count in counts if batches >= BATCHES_PER_WORKER * count]
            if not counts and not pin:
                return Verdict(False, f"{batches} batches a pass are too few to start workers for")
        gains = {count: predict(share, largest.workers, count, cores, cuda) for count in counts}
        counts.sort(key=lambda count: (-round(gains[count], 2), count))
        candidates: list[dict[str, Setting]] = [{"workers": count} for count in counts]
        if candidates and _short(largest):
            candidates.insert(1, {**candidates[0], "persistent": True})
        if pin:
            candidates = [{**item, "pin": True} for item in candidates] or [{"workers": largest.workers, "pin": True}]
        return Verdict(
            bool(candidates),
            f"training waits for data in {units.percent(share)} of the step" if known else "the wait is unknown",
            gain=max(gains.values(), default=None) if known else None,
            rests_on="perfect overlap of reading and computing" + ("" if cuda else ", both sharing the cores"),
            candidates=tuple(candidates),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> LoaderApplied | Persistence | NoEffect | None:
        """Change the arguments of a loader being built; keep its workers once it is."""
        if isinstance(moment, LoaderReady):
            return _persist(moment.loader) if settings["persistent"] else None
        if not isinstance(moment, LoaderArgs):
            return None
        return _change(moment, settings)


def _counts(cores: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= cores:
        counts.append(counts[-1] * 2)
    return sorted({*counts, cores})


def _short(loader: LoaderFacts) -> bool:
    """Whether an epoch is so short that starting workers may be felt."""
    return bool(loader.samples and loader.batch_size and loader.samples / loader.batch_size <= 1000)


def predict(share: float, before: int, after: int, cores: int, cuda: bool) -> float:
    """Speed-up of the step if reading and computing overlap perfectly.

    Args:
        share: fraction of the step spent waiting. before, after: workers. cores: cores both sides share.

    With workers already there, a step that waits is as long as one worker's batch divided by their number. On CPU the
    work itself does not vanish: it is shared by the cores at best.
    """
    if share <= 0:
        return 1.0
    one_batch = share if before == 0 else float(before)
    step = max(1.0 - share, one_batch / after)
    if not cuda and before == 0:
        step = max(step, 1.0 - share + share / max(1, cores))
    return 1.0 / max(step, 1e-3)


def _persist(loader: Any) -> Persistence | NoEffect | None:
    if loader.num_workers == 0:
        return None
    if loader.persistent_workers:
        return NoEffect("the script keeps its workers itself")
    if "_get_iterator" in vars(loader):
        return NoEffect("something else already stands in for the loader's iterators")
    return Persistence(loader)


def _change(moment: LoaderArgs, settings: dict[str, Setting]) -> LoaderApplied | NoEffect | None:
    import torch
    from torch.utils.data import IterableDataset, MapDataPipe

    args, dataset = moment.args, moment.args.get("dataset")
    name = type(dataset).__name__
    if isinstance(dataset, (IterableDataset, MapDataPipe)):
        return NoEffect(f"{name}: workers would double the data of a dataset that is a stream")
    before = int(args.get("num_workers") or 0)
    workers = min(int(settings["workers"]), machine.usable_cores())
    prefetch = int(settings["prefetch"])
    pin = bool(settings["pin"]) and torch.cuda.is_available() and not args.get("pin_memory")
    wanted: dict[str, Any] = {}
    if workers:
        had = args.get("prefetch_factor")
        if workers != before or prefetch != (2 if had is None else had):
            wanted.update(num_workers=workers, prefetch_factor=prefetch)
            if why := obstacle(args, workers, prefetch, moment.main_guard):
                return NoEffect(f"{name}: {why}")
    elif before:
        wanted.update(num_workers=0)
    if pin:
        wanted.update(pin_memory=True)
    if not wanted:
        if workers and settings["persistent"] and not args.get("persistent_workers"):
            return None
        return NoEffect(f"{name}: the script's loader already is built like this")
    args.update(wanted)
    if not workers and before:
        # None of these is allowed, or means anything, without workers.
        for key in ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout"):
            args.pop(key, None)
    cut = " (as many as there are cores)" if workers < int(settings["workers"]) else ""
    return LoaderApplied(f"{name}: num_workers {before} -> {workers}{cut}" + (", pinned memory" if pin else ""))
