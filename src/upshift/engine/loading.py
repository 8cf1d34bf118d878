"""Map-style datasets: torch's DataLoader reads this rank's micro-batches, in the engine's order.

The loader is told the indices of every micro-batch; what comes back is put together to global batches. Workers read
ahead, yet the position of a run is what was handed out: after a resume, or when a worker was killed, reading begins at
the first sample that was not. A sample that cannot be read is left out of its batch, named, and not tried again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from upshift.engine import workers
from upshift.engine.batches import Batch, Data, Part, Shape, divide, moved
from upshift.engine.order import LOADER, Piece, mix, order, spans
from upshift.engine.samples import Collated, Collating, Samples
from upshift.errors import DataChangedError, DataError, UsageError

#: What a DataLoader may be told; the rest follows from the job.
ARGUMENTS = (
    "num_workers", "prefetch_factor", "pin_memory", "pin_memory_device", "persistent_workers", "timeout",
    "multiprocessing_context", "worker_init_fn",
)  # fmt: skip

#: Batches after which another death of a worker is no longer the same trouble.
CALM = 100

#: Bad samples allowed: this many, or this share of the data if it is more.
BUDGET, BUDGET_SHARE = 10, 0.001

_END = object()


class _Died(RuntimeError):
    """A worker process has ended; what PyTorch says of it is a RuntimeError too."""


def check_arguments(loader: dict[str, Any]) -> None:
    """Refuse arguments of a DataLoader that would change what is trained.

    Raises:
        UsageError: names the argument.
    """
    for key in loader:
        if key not in ARGUMENTS:
            raise UsageError(
                f"{key!r} is no argument of the loader that can be set here.",
                remedy=f"Known are {', '.join(ARGUMENTS)}; batches and their order follow from the job.",
            )


class Cuts:
    """A batch sampler: the indices of this rank's micro-batches. `asked` are the global batches under way."""

    def __init__(self, data: MapData) -> None:
        self._data = data
        self.asked: deque[tuple[int, int, list[Piece]]] = deque()
        self._rows: Any = None
        self._cursor = 0

    @property
    def batch_size(self) -> int:
        """Samples of a micro-batch at most."""
        return self._data.micro_batch

    def rewind(self, rows: Any, cursor: int) -> None:
        """The next pass begins at place `cursor` of this order."""
        self._rows, self._cursor = rows, cursor
        self.asked = deque()

    def __len__(self) -> int:
        shape = self._data.shape
        left = self._data.length - self._cursor
        pieces = len(spans(shape.global_batch, shape.world, shape.rank, self._data.micro_batch))
        return -(-left // shape.global_batch) * pieces

    def __iter__(self) -> Iterator[list[int]]:
        # What is read ahead belongs to this pass, whichever pass has begun since.
        asked, rows, place = self.asked, self._rows, self._cursor
        shape = self._data.shape
        while place < len(rows):
            size = min(shape.global_batch, len(rows) - place)
            layout = spans(size, shape.world, shape.rank, self._data.micro_batch)
            pieces = [Piece(rows[place + span.start : place + span.stop], span.n, span.weight) for span in layout]
            share = sum(piece.n for piece in pieces)
            pieces = self._known(pieces)
            asked.append((size, share, pieces))
            for piece in pieces:
                yield piece.indices.tolist()
            place += size

    def _known(self, pieces: list[Piece]) -> list[Piece]:
        """Without samples known to be bad; if nothing is left, one other sample that does not count."""
        import torch

        bad = self._data.quarantined
        if not bad:
            return pieces
        good = []
        for piece in pieces:
            kept = [index for index in piece.indices.tolist() if index not in bad]
            if len(kept) == len(piece.indices):
                good.append(piece)
            elif kept:
                good.append(Piece(torch.tensor(kept), min(piece.n, len(kept)), piece.weight))
        if good:
            return good
        last, count = int(pieces[0].indices[-1]), self._data.length
        other = next(
            ((last + ahead) % count for ahead in range(1, count + 1) if (last + ahead) % count not in bad), last
        )
        return [Piece(torch.tensor([other]), 0, 0.0)]


class MapData(Data):
    """Batches of a map-style dataset.

    Args:
        dataset: the user's. collate: their collate function, None: torch's. loader: see `ARGUMENTS`.
        draws: False for a dataset known to draw no random numbers.
        budget: bad samples allowed; None: 10, or 0.1 % of the data.
        on_args: is handed the arguments of the DataLoader and may change them. on_loader: is handed the loader.
    """

    kind = "map"

    def __init__(
        self,
        dataset: Any,
        shape: Shape,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        loader: dict[str, Any] | None = None,
        draws: bool = True,
        budget: int | None = None,
        on_args: Callable[[dict[str, Any]], None] | None = None,
        on_loader: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__(shape)
        self.length: int = len(dataset)
        self._check()
        check_arguments(loader or {})
        self.samples = Samples(dataset, shape.seed, draws=draws)
        self.budget = max(BUDGET, int(BUDGET_SHARE * self.length)) if budget is None else budget
        self.quarantined: dict[int, str] = {}
        self._cuts = Cuts(self)
        self._pass = 0
        self.loader = self._build(collate, dict(loader or {}), on_args)
        if on_loader is not None:
            on_loader(self.loader)

    def _build(
        self,
        collate: Callable[[list[Any]], Any] | None,
        own: dict[str, Any],
        on_args: Callable[[dict[str, Any]], None] | None,
    ) -> Any:
        import torch
        from torch.utils.data import DataLoader, default_collate

        self._generator = torch.Generator(device="cpu")
        args = {"dataset": self.samples, "batch_sampler": self._cuts, "generator": self._generator, **own}
        if collate is not None:
            args["collate_fn"] = collate
        if on_args is not None:
            on_args(args)
        if args.get("num_workers"):
            args.setdefault("persistent_workers", True)
        loader = DataLoader(**args)
        custom = loader.collate_fn is not default_collate
        # Only now is it known for sure whether there are workers.
        if loader.num_workers:
            loader.worker_init_fn = workers.WorkerInit(loader.worker_init_fn)
        if custom or loader.num_workers:
            loader.collate_fn = Collating(loader.collate_fn, self.samples, seeded=custom)
        return loader

    def epoch(self, epoch: int, cursor: int = 0) -> Iterator[Batch]:
        """What is left of an epoch once `cursor` samples of it were consumed.

        Raises:
            DataError: too many samples cannot be read, or workers die again and again.
        """
        self._check_cursor(cursor)
        self._pass = mine = self._pass + 1
        shape = self.shape
        rows = order(self.length, shape.seed, epoch, shape.shuffle and shape.training)
        calm = CALM
        while cursor < self.length:
            source: Any = None
            try:
                self._all_alive(None)
                self.samples.begin(epoch)
                self._generator.manual_seed(mix(LOADER, shape.seed, epoch))
                self._cuts.rewind(rows, cursor)
                source = workers.started(self.loader)
                while (batch := self._next(source)) is not None:
                    yield batch
                    if self._pass != mine:
                        raise UsageError("another pass over the data has begun.", remedy="Use one pass at a time.")
                    cursor += batch.samples
                    calm += 1
            except RuntimeError as error:
                gone = workers.dead(self.loader, source) if self.loader.num_workers else []
                if not gone:
                    error.add_note(f"while samples {cursor} and following of epoch {epoch} were read")
                    raise
                workers.end(self.loader, source)
                what = f"a process that reads data ended ({'; '.join(gone)})"
                if calm < CALM:
                    raise DataError(
                        f"{what}, again after {calm} batches, at sample {cursor} of epoch {epoch}.",
                        remedy="Look for what ends it (out of memory?), use fewer workers; the run can be resumed.",
                    ) from error
                calm = 0
                shape.say(f"{what}; started again at sample {cursor} of epoch {epoch}")
                continue
            if cursor < self.length:
                raise DataError(
                    f"the loader ended at sample {cursor} of {self.length}.", remedy="Use the stock DataLoader."
                )

    def _next(self, source: Any) -> Batch | None:
        """The next global batch, or None at the end."""
        self._all_alive(source)
        self.samples.forget_bad()
        raw = next(source, _END)
        if raw is _END:
            return None
        size, share, pieces = self._cuts.asked.popleft()
        read: list[tuple[Any, Any, int]] = []
        for number, piece in enumerate(pieces):
            if number:
                self.samples.forget_bad()
                raw = next(source, _END)
                if raw is _END:
                    return None
            batch, bad = raw if type(raw) is Collated else (raw, self.samples.bad)
            rows, n = piece.indices, piece.n
            if bad:
                self._quarantine(dict(bad))
                rows, n = self._without(rows, n, bad)
            read.append((moved(batch, self.shape.device), rows, n))
        counted = [item for item in read if item[2]] or read[:1]
        found = sum(n for _, _, n in counted)
        lost = share - found
        # Alone, what was lost is known here; with other ranks the loop learns how many they lost.
        whole = size - lost if self.shape.world == 1 else size
        parts = [Part(batch, self.shape.world * n / whole if n else 0.0, rows, n) for batch, rows, n in counted]
        micro = self.micro_batch
        if any(len(part.rows) > micro for part in parts):
            parts = [smaller for part in parts for smaller in divide(part, micro)]
        return Batch(parts, size, lost)

    def _all_alive(self, source: Any) -> None:
        # PyTorch looks only after five seconds without a batch.
        if self.loader.num_workers and workers.dead(self.loader, source):
            raise _Died

    @staticmethod
    def _without(rows: Any, n: int, bad: dict[int, str]) -> tuple[Any, int]:
        import torch

        kept = [index for index in rows.tolist() if index not in bad]
        return (torch.tensor(kept), min(n, len(kept))) if kept else (rows[:1], 0)

    def _quarantine(self, bad: dict[int, str]) -> None:
        for index, error in bad.items():
            if index in self.quarantined:
                continue
            self.quarantined[index] = error
            self.shape.say(
                f"sample {index} cannot be read and is left out ({error}); {len(self.quarantined)} of at most "
                f"{self.budget}"
            )
        if len(self.quarantined) > self.budget:
            shown = ", ".join(map(str, sorted(self.quarantined)[:20])) + (", ..." if len(self.quarantined) > 20 else "")
            raise DataError(
                f"{len(self.quarantined)} samples cannot be read, more than the {self.budget} allowed: {shown}; "
                f"the last one: {list(self.quarantined.values())[-1]}",
                remedy="Repair or remove them; the run can be resumed from its last checkpoint.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Length of the data and its bad samples."""
        return {**super().state_dict(), "quarantined": [[index, why] for index, why in self.quarantined.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Samples found bad before are not tried again."""
        super().load_state_dict(state)
        found = {int(index): str(why) for index, why in state.get("quarantined", ())}
        if any(not 0 <= index < self.length for index in found):
            raise DataChangedError("the state names samples that the data does not have.", remedy="Start anew.")
        self.quarantined = found

    def close(self) -> None:
        """End worker processes."""
        self._pass += 1
        if self.loader.num_workers:
            workers.end(self.loader, None)
