"""A map-style dataset as the engine reads it: every sample under a seed of its own, bad samples left out and named.

Seeds. Before a sample is read, torch, Python and numpy are seeded with f(seed, epoch, index). Its random augmentation
is then the same in whichever process, order or batch it is read, and after a resume. In the training process the random
streams are put back afterwards, so that reading does not disturb dropout. A collate function of the user's own
(masking, mixing) is seeded alike, with the first index of its micro-batch. Not covered: generators that a dataset keeps
itself, and draws on an accelerator. A dataset that reads many samples a call (`__getitems__`) gets a seed per call.

Bad samples. An exception while a sample is read leaves this sample out; `bad` says which and why. An `OSError` is tried
a second time first. Where no sample of a micro-batch can be read, another one stands in, so that there is something
to run; it is not counted.

Those who look at the dataset from outside (a cache has to know whether reading draws random numbers) see draws, hidden
by putting the streams back, as movement of `drew`, a generator that is used for nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from upshift.engine.memory import is_out_of_memory
from upshift.engine.order import COLLATE, SAMPLE, mix
from upshift.errors import DataError

if TYPE_CHECKING:
    import torch

#: Samples tried as a stand-in before a dataset counts as unreadable.
TRIES = 32


def _numpy_random() -> Any:
    """numpy's global random stream; None where numpy is not installed."""
    try:
        import numpy
    except ModuleNotFoundError:
        return None
    return numpy.random


def seed_streams(seed: int) -> None:
    """Seed the CPU streams of torch, Python and numpy (63 bits)."""
    import torch

    # Not torch.manual_seed: that would seed the accelerators too.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy_random = _numpy_random()
    if numpy_random is not None:
        numpy_random.seed(seed & 0xFFFFFFFF)


def _states() -> tuple[Any, Any, Any]:
    import torch

    numpy_random = _numpy_random()
    own = numpy_random.get_state(legacy=False) if numpy_random is not None else None
    return torch.default_generator.get_state(), random.getstate(), own


def _next_draws() -> tuple[Any, ...]:
    """One draw from each stream: differs where a stream has moved. (numpy takes 50 us to tell its state.)"""
    import torch

    numpy_random = _numpy_random()
    own = torch.empty((), dtype=torch.int64, device="cpu").random_().item()
    return own, random.getrandbits(63), numpy_random.bytes(8) if numpy_random is not None else b""


@contextmanager
def streams_kept() -> Iterator[None]:
    """The CPU streams of torch, Python and numpy are afterwards where they were."""
    import torch

    own, python, numpy_state = _states()
    try:
        yield
    finally:
        torch.default_generator.set_state(own)
        random.setstate(python)
        if numpy_state is not None:
            _numpy_random().set_state(numpy_state)


def in_worker() -> bool:
    """Whether this is a worker process of a DataLoader."""
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None


class Fetched(list[Any]):
    """The samples of a micro-batch that could be read; `indices` are those asked for, `bad` index -> error."""

    indices: list[int]
    bad: dict[int, str]


class Live:
    """What changes while a dataset is read: the epoch, in memory shared with workers, and the last bad samples.

    An object without `__dict__`, so that a dataset does not look changed because another epoch has begun.
    """

    __slots__ = ("bad", "seen", "shared")

    def __init__(self) -> None:
        import torch

        self.shared: torch.Tensor = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.shared.share_memory_()  # type: ignore[no-untyped-call]
        self.bad: dict[int, str] = {}
        self.seen = -1

    @property
    def epoch(self) -> int:
        """The epoch being read."""
        return int(self.shared.item())


def reads_many(dataset: Any) -> bool:
    """Whether a dataset reads many samples in one call itself, not only hands the call on (`Subset`)."""
    from torch.utils.data import Subset

    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


class Samples:
    """A map-style dataset whose samples are read under their own seeds.

    Args:
        dataset: has `__len__` and `__getitem__`, perhaps `__getitems__`. seed: of the training.
        draws: False for a dataset known to draw no random numbers: nothing is seeded then.
    """

    def __init__(self, dataset: Any, seed: int, *, draws: bool = True) -> None:
        import torch

        self.dataset = dataset
        self.seed, self.draws = seed, draws
        self.many = reads_many(dataset)
        self.drew: torch.Generator | None = torch.Generator(device="cpu") if draws else None
        self._live = Live()

    def __getstate__(self) -> dict[str, Any]:
        # In another process nobody looks at `drew`, and not every torch can send a generator.
        return {**self.__dict__, "drew": None}

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def bad(self) -> dict[int, str]:
        """What could not be read in the last call of `__getitems__` in this process: index -> error."""
        return self._live.bad

    @property
    def epoch(self) -> int:
        """The epoch being read, in whatever process."""
        return self._live.epoch

    def begin(self, epoch: int) -> None:
        """Another epoch begins: workers that are already there learn of it too."""
        self._live.shared.fill_(epoch)
        self._live.seen = -1  # told in any case: somebody may have read a sample and put the dataset back since
        self._enter()

    def forget_bad(self) -> None:
        """Before a micro-batch is asked for in this process."""
        self._live.bad = {}

    def _enter(self) -> None:
        live = self._live
        epoch = live.epoch
        if live.seen != epoch:
            live.seen = epoch
            told = getattr(self.dataset, "set_epoch", None)
            if callable(told):
                told(epoch)

    def __getitem__(self, index: int) -> Any:
        self._enter()
        with self._kept():
            return self._read(index)

    def __getitems__(self, indices: list[int]) -> Fetched:
        self._enter()
        fetched = Fetched()
        fetched.indices, fetched.bad = list(indices), {}
        with self._kept():
            if self.many:
                fetched.extend(self._read_many(fetched.indices, fetched.bad))
            else:
                fetched.extend(self._each(fetched.indices, fetched.bad))
            if not fetched:
                fetched.append(self._stand_in(fetched))
        self._live.bad = fetched.bad
        return fetched

    @contextmanager
    def _kept(self) -> Iterator[None]:
        if not self.draws or in_worker():
            yield
            return
        with streams_kept():
            yield

    def _under(self, seed: int, read: Callable[[], Any], watch: bool) -> Any:
        """What `read` returns with the streams at `seed`; `watch`: whether it draws is to be seen by `drew`."""
        import torch

        if not self.draws:
            return read()
        if not watch or self.drew is None or in_worker():
            seed_streams(seed)
            return read()
        seed_streams(seed)
        untouched = _next_draws()
        seed_streams(seed)
        found = read()
        if _next_draws() != untouched:
            torch.empty((), dtype=torch.int64, device="cpu").random_(generator=self.drew)
        return found

    def _read(self, index: int, watch: bool = True) -> Any:
        def once() -> Any:
            return self.dataset.__getitems__([index])[0] if self.many else self.dataset[index]

        seed = mix(SAMPLE, self.seed, self.epoch, index)
        try:
            return self._under(seed, once, watch)
        except OSError:
            return self._under(seed, once, watch)

    def _each(self, indices: list[int], bad: dict[int, str]) -> Iterator[Any]:
        last = len(indices) - 1
        for place, index in enumerate(indices):
            try:
                # One of a call is watched; a cache proves a dataset with calls of one sample.
                sample = self._read(index, place == last)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                bad[index] = f"{type(error).__name__}: {error}"
                continue
            yield sample

    def _read_many(self, indices: list[int], bad: dict[int, str]) -> list[Any]:
        try:
            return self._call(indices)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            for _ in self._each(indices, bad):
                pass
            if not bad:
                raise
        good = [index for index in indices if index not in bad]
        # Anew, under the seed they will have when the bad ones are known beforehand.
        return self._call(good) if good else []

    def _call(self, indices: list[int]) -> list[Any]:
        seed = mix(SAMPLE, self.seed, self.epoch, indices[0])
        found = self._under(seed, lambda: self.dataset.__getitems__(list(indices)), True)
        if len(found) != len(indices):
            raise DataError(
                f"{type(self.dataset).__name__}.__getitems__ gave {len(found)} samples for {len(indices)} indices.",
                remedy="It is to return one sample for each index.",
            )
        return list(found)

    def _stand_in(self, fetched: Fetched) -> Any:
        first, count = fetched.indices[-1], len(self)
        for ahead in range(1, min(count, TRIES) + 1):
            index = (first + ahead) % count
            if index not in fetched.bad:
                for sample in self._each([index], fetched.bad):
                    return sample
        index, error = next(iter(fetched.bad.items()))
        raise DataError(
            f"none of {len(fetched.bad)} samples in a row could be read; sample {index}: {error}",
            remedy="Look at the files and the code of the dataset.",
        )


class Collated(NamedTuple):
    """A micro-batch as a worker process sends it, with what it could not read."""

    batch: Any
    bad: dict[int, str]


class Collating:
    """A collate function, seeded where it is the user's own; in worker processes it reports bad samples as well."""

    def __init__(self, collate: Callable[[list[Any]], Any], samples: Samples, *, seeded: bool) -> None:
        self.collate, self.samples, self.seeded = collate, samples, seeded and samples.draws

    def __call__(self, fetched: Any) -> Any:
        if type(fetched) is not Fetched:
            return self.collate(fetched)
        batch = self._together(fetched)
        return Collated(batch, fetched.bad) if in_worker() else batch

    def _together(self, fetched: Fetched) -> Any:
        try:
            if not self.seeded:
                return self.collate(list(fetched))
            first = next((index for index in fetched.indices if index not in fetched.bad), fetched.indices[0])
            seed = mix(COLLATE, self.samples.seed, self.samples.epoch, first)
            if in_worker():
                seed_streams(seed)
                return self.collate(list(fetched))
            with streams_kept():
                seed_streams(seed)
                return self.collate(list(fetched))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            shown = ", ".join(map(str, fetched.indices[:16])) + (", ..." if len(fetched.indices) > 16 else "")
            raise DataError(
                f"the samples {shown} could not be put together: {type(error).__name__}: {error}",
                remedy="Give samples one shape, or give the job a collate function that pads them.",
            ) from error
