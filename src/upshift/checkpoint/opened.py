"""One checkpoint, its files open: each is checked once, and read through the descriptor that was checked.

Tensors come one at a time, whole or in part, so that a training on another number of ranks takes what it needs out of
files that other ranks wrote, and never holds a second model: at any moment what was asked for, and one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from upshift.checkpoint import disk as io
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.manifest import STATE, Manifest, rank_file
from upshift.checkpoint.shards import Box, Shape, whole
from upshift.checkpoint.states import RankState, rank_state
from upshift.checkpoint.tensors import Contents
from upshift.checkpoint.tree import in_order, join
from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: One file's share of a tensor: the file, and the block of the tensor that it holds.
Piece = tuple[Contents, Box]
Check = Callable[[int, str, Manifest], None]


class Stored:
    """A tensor that is read when it is asked for, while its checkpoint is open. `shape` is that of the whole."""

    def __init__(
        self, name: str, shape: Shape, pieces: Callable[[], Iterator[Piece]], stride: list[int] | None = None
    ) -> None:
        """
        Args:
            name: under which it lies in the files.
            pieces: opens the files that hold some of it, one after the other.
            stride: of the whole one in memory, where its elements have another order than its axes.
        """
        self.name, self.shape = name, shape
        self._pieces, self._stride = pieces, stride

    def whole(self) -> torch.Tensor:
        """All of it, on the host.

        Raises:
            CheckpointError: the files do not hold all of it, or not what their header says.
            OSError: they cannot be read.
        """
        found = self.part((0,) * len(self.shape), self.shape)
        try:
            return found if self._stride is None else in_order(found, self._stride)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.name!r:.80}: {error!s:.120}.") from None

    def part(self, offset: Shape, shape: Shape) -> torch.Tensor:
        """The block of this shape whose first element has the index `offset`, on the host; errors as for `whole`."""
        import torch

        wanted, result, taken = Box(offset, shape), None, list[Box]()
        for contents, box in self._pieces():
            if box == wanted and result is None:
                return contents.read(self.name)
            common = wanted.common(box)
            if common is None:
                continue
            rows, rest = _rows(common, box)
            if common == wanted and rest is None and result is None:
                return contents.read(self.name, rows)
            part = contents.read(self.name, rows)
            part = part if rest is None else part[rest]
            if result is None:
                result = torch.empty(wanted.shape, dtype=part.dtype)
            if part.dtype != result.dtype or any(common.common(other) for other in taken):
                raise CheckpointError(f"the shards of {self.name!r:.80} do not fit together.")
            result[common.inside(wanted)] = part
            taken.append(common)
            if sum(item.count for item in taken) == wanted.count:
                return result
        if wanted.count == 0 and (one := next(self._pieces(), None)) is not None:
            return torch.empty(shape, dtype=one[0].kind(self.name)[0])
        raise CheckpointError(f"the files do not hold all of {self.name!r:.80}.")


def _rows(common: Box, box: Box) -> tuple[tuple[int, int] | None, tuple[slice, ...] | None]:
    """What to read of a shard to get `common`: its rows, and, where that is more than wanted, the index in these."""
    if not common.shape:
        return None, None
    first, *others = common.inside(box)
    rows = (first.start, first.stop)
    narrow = any(a.stop - a.start != n for a, n in zip(others, box.shape[1:], strict=True))
    return rows, (slice(None), *others) if narrow else None


class Opened:
    """A checkpoint to be read by one rank. Use as a context; what it hands out is read before its end."""

    def __init__(self, disk: Disk, folder: Path, manifest: Manifest, check: Check, rank: int) -> None:
        """
        Args:
            disk: reads.
            folder: of the checkpoint.
            check: raises CheckpointError where an open file is not what the manifest says.
            rank: whose shards are looked for first.
        """
        self._disk, self._folder, self.manifest, self._check = disk, folder, manifest, check
        self._first = rank if rank < manifest.world else 0
        self._stack = ExitStack()
        self._files: dict[int, Contents] = {}
        self._states: dict[int, RankState] = {}
        self._text = bytearray()
        self._over = False

    @property
    def facts(self) -> dict[str, Any]:
        """What the writer put into the manifest."""
        return self.manifest.facts

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over = True
        self._stack.close()
        for contents in self._files.values():
            contents.close()

    def tree(self, rank: int) -> Any:
        """The state that a rank wrote, tensors whole and on the host; those that are spread are put together.

        Raises:
            CheckpointError, OSError: damaged, or cannot be read.
        """
        contents, file = self._open(rank), rank_file(rank, self.manifest.world)
        names = [name for name in contents.names if name not in contents.shards]
        try:
            if (size := sum(map(contents.size, names))) > (most := memory()):
                raise CheckpointError(f"it has {size:,} bytes, more than this machine has memory ({most:,}).")
            tensors = {name: contents.read(name) for name in names}
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error.message}") from None
        return join(self._state(rank).tree, tensors, spread=lambda name, shape: self._spread(name, shape).whole())

    def lazily(self, rank: int) -> Any:
        """As `tree`, with a `Stored` in place of each tensor; views of shared memory are read at once."""
        contents = self._open(rank)

        def leaf(name: str, stride: list[int] | None) -> Stored:
            shape = contents.kind(name)[1]
            return Stored(name, shape, lambda: iter([(contents, whole(shape))]), stride)

        return join(self._state(rank).tree, _OnDemand(contents), leaf=leaf, spread=self._spread)

    def _spread(self, name: str, shape: Shape) -> Stored:
        def pieces() -> Iterator[Piece]:
            order = [self._first, *(rank for rank in range(self.manifest.world) if rank != self._first)]
            for rank in order:
                contents = self._open(rank)
                if name in contents.shards:
                    known, box = contents.shards[name]
                    if known != shape:
                        raise CheckpointError(f"the shards of {name!r:.80} do not belong to a tensor of shape {shape}.")
                    yield contents, box

        return Stored(name, shape, pieces)

    def _open(self, rank: int) -> Contents:
        """A rank's file, checked."""
        if self._over:
            raise ValueError("the checkpoint is closed")
        if rank not in self._files:
            file, state = rank_file(rank, self.manifest.world), self._state(rank)
            fd = self._stack.enter_context(io.opened(self._folder, file))
            self._check(fd, file, self.manifest)
            try:
                self._files[rank] = Contents(self._disk, fd, state.dtypes)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error.message}") from None
        return self._files[rank]

    def _state(self, rank: int) -> RankState:
        if not self._text:
            with io.opened(self._folder, STATE) as fd:
                self._check(fd, STATE, self.manifest)
                data = bytearray(self.manifest.files[STATE].size)
                io.fill(self._disk, fd, memoryview(data))
            self._text = data
        if rank not in self._states:
            self._states[rank] = rank_state(self._text, self.manifest.world, rank)
        return self._states[rank]


class _OnDemand(dict[str, Any]):
    """The tensors of a file, read when they are asked for."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def __missing__(self, name: str) -> torch.Tensor:
        found = self[name] = self._contents.read(name)
        return found


def held(tree: Any) -> Any:
    """A state with each `Stored` in it read.

    Raises:
        CheckpointError, OSError: as `Stored.whole`.
    """
    if isinstance(tree, Stored):
        return tree.whole()
    if isinstance(tree, dict):
        changed = type(tree)((key, held(value)) for key, value in tree.items())
        if hasattr(tree, "_metadata"):
            changed._metadata = tree._metadata  # type: ignore[attr-defined]
        return changed
    if isinstance(tree, (list, tuple)):
        return type(tree)(held(value) for value in tree)
    return tree


def memory() -> int:
    """Bytes of memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)
