"""Iterable datasets: a stream that is read once, in its own order.

The position in a stream is kept by torchdata's `StatefulDataLoader` where it is installed and the dataset has a state,
which is taken after the last batch handed out: a resumed run goes on behind it. Else a resumed run reads the epoch from
its start and skips what was consumed, which is exact only if the stream gives the same samples again.

Where the training process itself reads, every micro-batch is read under a seed f(seed, epoch, number) and the random
streams are put back, as for other datasets. In worker processes a stream has to keep its own random state.

Ranks. A dataset that shards itself gives each rank its own samples (`sharded`). Any other is read by all ranks, and
each takes every world-th micro-batch. Ranks agree before every update on how many samples it has, so that one whose
stream has ended runs along with weight 0 until all have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from upshift import _optional
from upshift.engine import workers
from upshift.engine.batches import Batch, Data, Part, Shape, divide, moved, rows_of
from upshift.engine.loading import check_arguments
from upshift.engine.order import LOADER, SAMPLE, mix
from upshift.engine.samples import seed_streams, streams_kept
from upshift.errors import DataChangedError, DataError, EmptyDataError, UsageError

#: Sums a list of numbers over the ranks.
Agree = Callable[[list[float]], list[float]]

_END = object()


class StreamData(Data):
    """Batches of an iterable dataset. The samples have no index: `rows` count from 0 in every micro-batch.

    Raises:
        UsageError: the global batch cannot be dealt to the ranks evenly, or there is no way for them to agree.
    """

    kind = "stream"

    def __init__(
        self,
        dataset: Any,
        shape: Shape,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        loader: dict[str, Any] | None = None,
        sharded: bool = False,
        on_args: Callable[[dict[str, Any]], None] | None = None,
        on_loader: Callable[[Any], None] | None = None,
        agree: Agree | None = None,
    ) -> None:
        if not shape.training:
            # An evaluation asks for no exact size.
            shape = dataclasses.replace(shape, global_batch=shape.share * shape.world)
        super().__init__(shape)
        self.length = None
        if shape.global_batch % shape.world:
            raise UsageError(
                f"{shape.global_batch} samples cannot be dealt evenly to {shape.world} ranks that read a stream.",
                remedy=f"Set global_batch to a multiple of {shape.world}.",
            )
        if shape.world > 1 and agree is None:
            raise UsageError("ranks that read a stream have to agree on its end.", remedy="Pass agree=group.agree.")
        check_arguments(loader or {})
        self._agree: Agree = agree or list
        self._dataset = dataset
        self._stride = 1 if sharded else shape.world
        pieces = -(-shape.share // self.micro_batch)
        while shape.share % pieces:
            pieces += 1
        self._pieces = pieces
        self._dealt = [shape.world, self._stride, shape.share // pieces]
        """What a place in the stream is counted by."""
        self._pass = 0
        self._place = (0, 0, 0)
        self._ended = False
        self._restored: dict[str, Any] | None = None
        self.stateful = _optional.available("torchdata.stateful_dataloader")
        self.loader = self._build(shape.share // pieces, collate, dict(loader or {}), on_args)
        if on_loader is not None:
            on_loader(self.loader)
        self._say_limits(sharded)

    def _build(
        self,
        size: int,
        collate: Callable[[list[Any]], Any] | None,
        own: dict[str, Any],
        on_args: Callable[[dict[str, Any]], None] | None,
    ) -> Any:
        import torch
        from torch.utils.data import DataLoader

        self._generator = torch.Generator(device="cpu")
        args = {"dataset": self._dataset, "batch_size": size, "generator": self._generator, **own}
        if collate is not None:
            args["collate_fn"] = collate
        if on_args is not None:
            on_args(args)
        if self.stateful:
            kind = _optional.require("torchdata.stateful_dataloader", extra="data", why="Resuming in a stream")
            loader = kind.StatefulDataLoader(**args)
        else:
            loader = DataLoader(**args)
        if loader.num_workers:
            loader.worker_init_fn = workers.WorkerInit(loader.worker_init_fn)
        return loader

    def _say_limits(self, sharded: bool) -> None:
        shape = self.shape
        if not shape.training:
            return
        known = callable(getattr(self._dataset, "state_dict", None))
        if not (self.stateful and known):
            what = "torchdata" if known else "state_dict"
            mend = "pip install 'upshift[data]'" if known else "give it state_dict and load_state_dict"
            shape.say(
                f"an iterable dataset without {what}: a resumed run reads the epoch again and skips what it has "
                f"trained on, which is exact only if the stream repeats itself ({mend})"
            )
        if shape.world > 1 and not sharded:
            shape.say(
                f"every rank reads the whole stream and takes every {shape.world}th micro-batch; a dataset that shards "
                "itself is faster"
            )

    def epoch(self, epoch: int, cursor: int = 0) -> Iterator[Batch]:
        """What is left of an epoch once `cursor` samples of it (over all ranks) were consumed.

        Raises:
            EmptyDataError: the stream gave nothing. DataError: reading it failed.
        """
        import torch

        self._check_cursor(cursor)
        self._pass = mine = self._pass + 1
        shape = self.shape
        number, source = self._open(epoch, cursor)
        stand_in: Part | None = None
        while True:
            found: list[Any] = []
            # To the end of the global batch also where this rank has its share, so that all are at one place after it.
            for _ in range(self._pieces * self._stride):
                batch = self._read(source, epoch, number)
                if batch is _END:
                    self._ended = True
                    break
                if self._stride == 1 or number % self._stride == shape.rank:
                    found.append(batch)
                number += 1
            counts = [self._count(batch) for batch in found]
            total = round(self._agree([float(sum(counts))])[0])
            if not total:
                break
            parts = [
                Part(moved(batch, shape.device), shape.world * count / total, torch.arange(count), count)
                for batch, count in zip(found, counts, strict=True)
            ]
            if not parts:
                stand_in = stand_in or self._stand_in(epoch)
                if stand_in is None:
                    raise DataError(
                        f"the stream of rank {shape.rank} is empty while others have samples.",
                        remedy="Shard the dataset so that every rank gets samples.",
                    )
                parts = [stand_in]
            micro = self.micro_batch
            if any(part.n > micro for part in parts):
                parts = [smaller for part in parts for smaller in divide(part, micro)]
            stand_in = Part(parts[0].batch, 0.0, parts[0].rows, 0)
            cursor += total
            self._place = (epoch, cursor, number)
            yield Batch(parts, total, 0)
            if self._pass != mine:
                raise UsageError("another pass over the data has begun.", remedy="Use one pass at a time.")
        if not cursor:
            raise EmptyDataError("the data has no samples.", remedy="Look at the path and the filter of the dataset.")

    def _stand_in(self, epoch: int) -> Part | None:
        """The beginning of the stream again, for a rank that was resumed at its end and has to run along."""
        import torch

        batch = self._read(self._begun(epoch, 0), epoch, 0)
        return None if batch is _END else Part(moved(batch, self.shape.device), 0.0, torch.arange(0), 0)

    def _open(self, epoch: int, cursor: int) -> tuple[int, Any]:
        """An iterator over what is left, and the number of the next micro-batch in the stream."""
        told = getattr(self._dataset, "set_epoch", None)
        if callable(told):
            told(epoch)
        self._generator.manual_seed(mix(LOADER, self.shape.seed, epoch))
        known, self._restored = self._restored, None
        if known is not None and (known["epoch"], known["cursor"]) != (epoch, cursor):
            known = None
        if known is not None and known.get("dealt", self._dealt) != self._dealt:
            known = None  # counted in other micro-batches: the number of samples says where to go on
        self._ended = known is not None and bool(known.get("ended"))
        if known is not None and self._ended:
            # Other ranks still have samples. A loader whose state is that of its end would begin anew.
            number, source = int(known["number"]), iter(())
        elif known is not None and _knows_its_place(known["loader"]):
            self.loader.load_state_dict(known["loader"])
            number, source = int(known["number"]), self._begun(epoch, int(known["number"]))
        else:
            source = self._begun(epoch, 0)
            number = self._skip(source, epoch, cursor, None if known is None else int(known["number"]))
        self._place = (epoch, cursor, number)
        return number, source

    def _skip(self, source: Any, epoch: int, cursor: int, number: int | None) -> int:
        """Read what was consumed, `number` micro-batches if that is known, and drop it; how many there were."""
        if not cursor:
            return 0
        self.shape.say(f"skipping {cursor} samples of the stream that epoch {epoch} has already trained on")
        # A dataset that shards itself gives this rank its share only.
        samples = cursor if self._stride == self.shape.world else cursor // self.shape.world
        seen = passed = 0
        whole = self._pieces * self._stride
        while passed < number if number is not None else seen < samples or passed % whole:
            batch = self._read(source, epoch, passed)
            if batch is _END:
                break
            seen += self._count(batch)
            passed += 1
        return passed

    def _begun(self, epoch: int, number: int) -> Any:
        if self.loader.num_workers:
            return workers.started(self.loader)
        with streams_kept():
            seed_streams(mix(SAMPLE, self.shape.seed, epoch, number))
            return iter(self.loader)

    def _read(self, source: Any, epoch: int, number: int) -> Any:
        try:
            if self.loader.num_workers:
                return next(source, _END)
            with streams_kept():
                seed_streams(mix(SAMPLE, self.shape.seed, epoch, number))
                return next(source, _END)
        except RuntimeError as error:
            gone = workers.dead(self.loader, source) if self.loader.num_workers else []
            if not gone:
                raise
            workers.end(self.loader, source)
            raise DataError(
                f"a process that reads the stream ended ({'; '.join(gone)}), at micro-batch {number} of epoch {epoch}.",
                remedy="Look for what ends it (out of memory?); the run can be resumed from its last checkpoint.",
            ) from error

    def _count(self, batch: Any) -> int:
        count = rows_of(batch)
        if count is None:
            raise DataError(
                f"a batch without tensors ({type(batch).__name__}): its samples cannot be counted.",
                remedy="Let the collate function return tensors whose first dimension is the batch.",
            )
        return count

    def state_dict(self) -> dict[str, Any]:
        """Epoch, cursor and the state of the loader after the last batch handed out."""
        state = {**super().state_dict(), "workers": self.loader.num_workers}
        state["epoch"], state["cursor"], state["number"] = self._place
        state["dealt"], state["ended"] = self._dealt, self._ended
        state["loader"] = self._loader_state()
        return state

    def _loader_state(self) -> Any:
        """The state of the loader where that says more than the number of batches; else None.

        For a dataset without a state torchdata 0.11 reads on to the place and counts that twice, so that the next state
        lies too far. Asked before the first pass it would begin one, which would draw its seed too early.
        """
        if not self.stateful:
            return None
        if self._restored is not None:
            return self._restored["loader"]
        if not self._pass:
            return None
        found = self.loader.state_dict()
        return found if _knows_its_place(found) else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which the state was taken.

        Raises:
            DataChangedError: with another number of workers; each of them has its own place in the stream.
        """
        super().load_state_dict(state)
        before, now = state.get("workers", 0), self.loader.num_workers
        if before != now:
            raise DataChangedError(
                f"the stream was read by {before} workers and is now by {now}; each has its own place in it.",
                remedy=f"Resume with num_workers={before}, or begin with the next epoch.",
            )
        self._restored = {**state, "loader": state["loader"] if self.stateful else None}
        self._place, self._ended = (state["epoch"], state["cursor"], state["number"]), bool(state.get("ended"))

    def close(self) -> None:
        """End worker processes."""
        self._pass += 1
        if self.loader.num_workers:
            workers.end(self.loader, None)


def _knows_its_place(state: Any) -> bool:
    """Whether the state of a loader holds one of the dataset or of its iterator, in this process or in workers."""
    if not isinstance(state, dict):
        return False
    if any(state.get(key) is not None for key in ("dataset_state", "dataset_iter_state")):
        return True
    return any(_knows_its_place(inner) for inner in state.values())
