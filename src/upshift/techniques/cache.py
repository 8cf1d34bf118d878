"""Read each sample of a deterministic dataset once; later epochs gather whole batches from one memory map.

Many scripts spend their time in `dataset[i]`: decoding and converting, in Python, to the same tensors every epoch.
Where reading is proven deterministic the results are kept, and a batch becomes one gather per field instead of one
Python call per sample and one small copy per leaf.

Proof. Before use, samples are read twice under different states of every random stream, in one batch and one by one,
and compared bit for bit (`measure.determinism`). A read that draws random numbers, even unused ones, refuses the cache:
skipping it would shift every later draw; this is checked again at every first read. While in use, at least one served
sample in a hundred (more at the start) is read anew and compared; a difference ends the cache, marks the run, and the
batch is read again in full. A dataset whose attributes change (`epoch`, a transform, a generator) ends it too.

Where it acts. The loader, its dataset, sampler and collate function stay the user's own objects; only the fetcher
inside each iterator of this loader is replaced, by an attribute `_get_iterator` on this one loader. Loaders with worker
processes are left alone: their fetchers live in the workers, and a read in the main process could open a file whose
handle the workers then share.

Limits. A dataset that changes without any trace in its attributes is noticed only by the re-reads. Random numbers from
neither a global stream nor a generator the dataset holds are noticed only by comparison.
"""

from __future__ import annotations

import math
import operator
import random
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from upshift import units
from upshift.measure.constancy import Glance, Streams, difference, fingerprint, generators
from upshift.measure.determinism import PROOF_READS, prove, read
from upshift.measure.samples import Rows, Unfit, batch_leaves, checker, memory_free, same_bits
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites.iterators import IteratorHook, taken, unsuited
from upshift.sites.moments import LoaderReady, Moment
from upshift.sites.protocol import BaseApplied, Card, NoEffect, Numerics, SettingSpec, Verdict

#: Beyond the agreed share, this many re-reads per e-fold of samples served: the first ones are watched closely.
EARLY = 8.0

#: Samples re-read at once, ahead of need, since guarding the random streams costs as much as reading a few.
GROUP = 4


class Store:
    """The samples of one dataset, filled as they are first read, and the watch over them.

    `reason` is set once it is out of use; `problem` as well if something wrong may have been served.
    `served`, `compared` count samples; `one_off_seconds` is the time for the proof and for filling.
    """

    def __init__(self, recheck: float = 0.01) -> None:
        self.rows: Rows | None = None
        self.reason = self.problem = ""
        self.served = self.compared = self.filled = 0
        self.one_off_seconds = 0.0
        self._recheck = recheck
        self._has = bytearray()
        self._print: dict[str, tuple[Any, ...]] = {}
        self._alike: Callable[[Any], bool] = bool
        self._own = random.Random(0)

    def open(self, dataset: Any, folder: str, limit: int, used: int) -> None:
        """Prove the dataset and map the file. On refusal `reason` says why.

        Args:
            folder: where the file goes. limit: bytes it may have. used: bytes of other maps of this process.
        """
        began = time.perf_counter()
        try:
            count = len(dataset)
            if count < 1:
                raise Unfit("the dataset is empty")
            rows, self._print = prove(dataset, count)
            memory, disk = memory_free(), shutil.disk_usage(folder or tempfile.gettempdir()).free
            room = min(limit - used, memory // 2 - used, disk * 4 // 5)
            if rows.bytes > room:
                raise Unfit(
                    f"it needs {units.binary(rows.bytes)} for {count} samples and may use {units.binary(max(room, 0))} "
                    f"(limit {units.binary(limit)}, free memory {units.binary(memory)}, free disk {units.binary(disk)})"
                )
            rows.map(folder)
            self._has = bytearray(count)
            self._alike = checker(rows.form)
            self.rows = rows
        except Unfit as refusal:
            self.reason = str(refusal)
        except (OSError, TypeError, NotImplementedError) as error:
            self.reason = f"{type(error).__name__}: {error}"
        self.one_off_seconds = time.perf_counter() - began

    @property
    def bytes(self) -> int:
        """Size of the map now in use."""
        return self.rows.bytes if self.rows is not None else 0

    def drop(self, reason: str, *, problem: bool = False) -> None:
        """Out of use for good; the map is freed, all later reads go to the dataset."""
        if problem and not self.problem:
            self.problem = reason
        self.reason = self.reason or reason
        self.rows = None
        self._has = bytearray()

    def changed(self, dataset: Any) -> str:
        """What of the dataset is not as it was at the proof, or the empty string."""
        if self.rows is None:
            return ""
        if len(dataset) != self.rows.count:
            return "length"
        return difference(self._print, fingerprint(dataset))

    def fetch(self, stock: Any, glance: Glance, owned: tuple[Any, ...], index: Any) -> Any:
        """The batch for these indices: from the map, from the dataset, or from both."""
        rows, has = self.rows, self._has
        if rows is None:
            return stock.fetch(index)
        if changed := glance.changed():
            self.drop(f"the dataset changed ({changed})")
            return stock.fetch(index)
        keys = _keys(index, rows.count)
        if keys is None:
            return stock.fetch(index)
        missing = [place for place, key in enumerate(keys) if not has[key]]
        if missing:
            began = time.perf_counter()
            wanted = index if len(missing) == len(keys) else [index[place] for place in missing]
            streams = Streams(owned)
            spent = time.perf_counter() - began
            data = read(stock.dataset, wanted)
            began = time.perf_counter()
            drawn = streams.moved()
            spent += time.perf_counter() - began
            batch = stock.collate_fn(data) if len(missing) == len(keys) else None
            began = time.perf_counter()
            if drawn:
                self.drop(f"reading a sample drew from {drawn}")
            else:
                self._keep(rows, data, batch, [keys[place] for place in missing])
            self.one_off_seconds += spent + time.perf_counter() - began
            if batch is not None:
                return batch
            if self.rows is None:
                streams.restore()
                return stock.fetch(index)
        leaves = rows.get(_array(keys))
        self.served += len(keys) - len(missing)
        skip = set(missing)
        places = [place for place in range(len(keys)) if place not in skip]
        if not self._confirm(rows, stock, owned, index, keys, places):
            return stock.fetch(index)
        return rows.batch(leaves)

    def _keep(self, rows: Rows, data: Any, batch: Any, keys: list[int]) -> None:
        from torch.utils.data import default_collate

        alike = len(data) == len(keys) and all(map(self._alike, data))
        if alike:
            leaves = batch_leaves(rows.form, default_collate(data) if batch is None else batch)
            alike = rows.fits(leaves)
        if not alike:
            self.drop("samples differ in shape or type")
            return
        rows.put(_array(keys), leaves)
        for key in keys:
            self.filled += not self._has[key]
            self._has[key] = 1

    def _confirm(
        self, rows: Rows, stock: Any, owned: tuple[Any, ...], index: Any, keys: list[int], places: list[int]
    ) -> bool:
        """Read as many of the samples just served anew as are due; False if one differs.

        An exception from the dataset is let through: without the cache this very batch would have raised it.
        """
        from torch.utils.data import default_collate

        due = self._recheck * self.served + EARLY * math.log1p(self.served / EARLY) - self.compared
        if due <= 0:
            return True
        chosen = self._own.sample(places, min(len(places), max(GROUP, math.ceil(due))))
        streams = Streams(owned)
        samples = read(stock.dataset, [index[place] for place in chosen])
        drawn = streams.moved()
        self.compared += len(chosen)
        if drawn:
            trouble = f"reading a sample again drew from {drawn}"
        elif len(samples) == len(chosen) and all(map(self._alike, samples)):
            fresh = batch_leaves(rows.form, default_collate(samples))
            kept = rows.get(_array([keys[place] for place in chosen]))
            if all(map(same_bits, kept, fresh)):
                return True
            trouble = "a sample read again was not what had been kept"
        else:
            trouble = "a sample read again had another shape or type than what had been kept"
        streams.restore()
        self.drop(f"{trouble}, after {self.served} samples had been served", problem=True)
        return False


def _keys(index: Any, count: int) -> list[int] | None:
    """Indices as plain numbers in range, or None where they are something else."""
    if type(index) is not list:
        return None
    if set(map(type, index)) != {int}:
        try:
            index = [operator.index(item) for item in index]
        except TypeError:
            return None
    return index if index and min(index) >= 0 and max(index) < count else None


def _array(keys: list[int]) -> Any:
    import numpy as np

    return np.array(keys, dtype=np.int64)


class Fetcher:
    """Stands for the fetcher of one iterator; everything it does not know is asked of the stock one."""

    def __init__(self, stock: Any, store: Store) -> None:
        self._stock, self._store = stock, store
        self._glance = Glance(stock.dataset)
        self._owned = generators(stock.dataset)

    def fetch(self, possibly_batched_index: Any) -> Any:
        """The next batch."""
        return self._store.fetch(self._stock, self._glance, self._owned, possibly_batched_index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


def _exchange(iterator: Any, store: Store) -> None:
    """Put the store before the fetcher of an iterator just built, if both still are what was proven."""
    from torch.utils.data._utils.fetch import _MapDatasetFetcher

    stock = getattr(iterator, "_dataset_fetcher", None)
    if store.rows is None or type(stock) is not _MapDatasetFetcher:
        return
    if changed := unsuited(stock.collate_fn, stock.auto_collation):
        store.drop(changed)
    elif changed := store.changed(stock.dataset):
        store.drop(f"the dataset changed between epochs ({changed})")
    else:
        iterator._dataset_fetcher = Fetcher(stock, store)


def refusal(loader: Any) -> str:
    """Why a loader cannot be served from a cache, before its dataset is read; the empty string if it can."""
    from torch.utils.data import IterableDataset, MapDataPipe

    if isinstance(loader.dataset, (IterableDataset, MapDataPipe)):
        return "its dataset is not a plain map from index to sample"
    if loader.num_workers > 0:
        return f"it reads in {loader.num_workers} worker processes; the cache serves loaders with num_workers=0"
    if taken(loader):
        return "something else already stands in for its iterators"
    return unsuited(loader.collate_fn, loader._auto_collation)


#: id(dataset) -> its weak reference and its store: a loader built anew each epoch finds what the last one filled.
_STORES: dict[int, tuple[weakref.ref[Any], Store]] = {}


def _store_for(loader: Any, folder: str, settings: dict[str, Setting]) -> Store:
    dataset = loader.dataset
    known = _STORES.get(id(dataset))
    if known is not None and known[0]() is dataset:
        return known[1]
    store = Store(float(settings["recheck"]))
    store.open(dataset, folder, int(settings["max_bytes"]), sum(kept.bytes for _, kept in _STORES.values()))
    key = id(dataset)

    def gone(_: Any) -> None:
        _STORES.pop(key, None)
        store.drop("its dataset is gone")

    try:
        _STORES[key] = (weakref.ref(dataset, gone), store)
    except TypeError:  # a list or tuple: lives as long as its loader
        weakref.finalize(loader, store.drop, "its loader is gone").atexit = False
    return store


class CacheApplied(BaseApplied):
    """A loader that is served from a store."""

    def __init__(self, loader: Any, store: Store) -> None:
        self._hook = IteratorHook(loader, lambda iterator: _exchange(iterator, store))
        self.store = store
        self.note = (
            f"{len(loader.dataset)} samples proven deterministic on {min(len(loader.dataset), PROOF_READS)}+ double "
            f"reads, {units.binary(store.bytes)} in a memory map; the first pass fills it"
        )

    @property
    def problem(self) -> str:
        """What may have gone wrong in the results, or the empty string. Not empty: the run must not count as a win."""
        return self.store.problem

    @property
    def one_off_seconds(self) -> float:
        """Seconds spent on the proof and on filling the map."""
        return self.store.one_off_seconds

    def effect(self) -> NoEffect | None:
        """No effect while no sample was asked for a second time, or once the cache was dropped."""
        if self.store.reason and self.store.reason != _CLOSED:
            return NoEffect(f"the cache was dropped: {self.store.reason}")
        if not self.store.served:
            return NoEffect("no sample has been asked for twice: the cache acts from the second pass over the data")
        return None

    def close(self) -> None:
        """Give the loader its own method back and free the map."""
        self._hook.remove()
        for key, (_, store) in list(_STORES.items()):
            if store is self.store:
                del _STORES[key]
        self.store.drop(_CLOSED)


_CLOSED = "closed"


class Cache:
    """Serve repeated samples of a deterministic dataset from a memory map."""

    card: ClassVar[Card] = Card(
        name="cache",
        summary="keep samples of a deterministic dataset in a memory map and gather whole batches from it",
        source="double reads under different random states; torch.utils.data.default_collate semantics",
        sites=("loader_ready",),
        numerics=Numerics.BITWISE,
        switchable="process",
        targets=("data",),
        details=(
            "Acts on map-style loaders with num_workers=0 and the default collate function whose samples have one "
            "fixed shape. The first pass over the data fills the map, later passes are served from it, with at least "
            "1 % of the samples read anew and compared. Any difference ends the cache and marks the run."
        ),
        settings={
            "max_bytes": SettingSpec(8 * 2**30, "largest map in bytes; never more than half of the free memory", low=1),
            "recheck": SettingSpec(0.01, "share of served samples that is read anew and compared", low=0.01, high=1.0),
        },
        conflicts=("loader",),
        one_off=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """The same bits: a dataset for which that is not so is refused or dropped."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies where training waits for an in-process, map-style loader that passes over its data more than once."""
        loaders = [item for item in seen.facts.loaders if item.training]
        if not loaders:
            return Verdict(False, "no training DataLoader was seen")
        plain = [item for item in loaders if not item.iterable]
        if not plain:
            return Verdict(False, "the training data is an IterableDataset")
        if all(item.workers for item in plain):
            return Verdict(False, f"the loader reads in {plain[0].workers} worker processes")
        share = seen.anatomy.share("data")
        if any(phase.name == "data" and phase.share.known for phase in seen.anatomy.phases) and share < 0.02:
            return Verdict(False, f"waiting for data is only {units.percent(share)} of the step")
        served, rests_on = 1.0, f"waiting for data is {units.percent(share)} of the step"
        first = next(item for item in plain if not item.workers)
        total, samples = seen.facts.steps_total, first.samples
        if total and samples and first.batch_size:
            micro = seen.anatomy.micro_batches.or_else(1.0)
            passes = total * micro * first.batch_size / samples
            if passes <= 1.0:
                return Verdict(False, "the script passes over its data only once")
            served = 1.0 - 1.0 / passes
            rests_on += f"; {passes:.1f} passes, of which the first fills the map"
        if not share:
            return Verdict(True, "an in-process loader; its share of the step is unknown")
        gain = 1.0 / (1.0 - 0.9 * share * served)
        reason = "samples are read in the training process, one Python call each"
        if first.custom_fetch:
            reason += "; it has a custom sampler or collate function, the latter would rule it out"
        return Verdict(True, reason, gain=gain, rests_on=rests_on + "; a gather is taken to cost a tenth of reading")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> CacheApplied | NoEffect | None:
        """Prove the dataset of a loader and put the cache before it."""
        if not isinstance(moment, LoaderReady):
            return None
        loader = moment.loader
        if why := refusal(loader):
            return NoEffect(f"{type(loader.dataset).__name__}: {why}")
        store = _store_for(loader, moment.scratch, settings)
        if store.reason:
            return NoEffect(f"{type(loader.dataset).__name__}: {store.reason}")
        return CacheApplied(loader, store)
