"""What the loop gets from its data: one `Batch` per update, cut into the micro-batches of this rank.

The kinds of data (`tensors`, `loading`, `streams`) share the interface `Data`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from upshift.errors import BatchTooLargeError, DataChangedError, DataError, EmptyDataError, UsageError

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """One micro-batch.

    batch: what the dataset gives, collated. weight: its loss (a mean) is multiplied by this before `backward`.
    rows: indices of the samples in it, int64. n: how many of them count; 0 for a stand-in with weight 0, which a rank
    without samples runs so that all ranks do the same work.
    """

    batch: Any
    weight: float
    rows: torch.Tensor
    n: int

    @property
    def indices(self) -> list[int]:
        """Indices of the samples that count, in order."""
        found: list[int] = self.rows[: self.n].tolist()
        return found


class Batch(NamedTuple):
    """The share of this rank in one global batch.

    samples: samples of the global batch over all ranks, by which the cursor advances. lost: samples of this rank's
    share that could not be read. With one process the weights take account of them; with several, the averaged
    gradient is to be multiplied by `samples / (samples - lost)`, `lost` summed over the ranks.
    """

    parts: list[Part]
    samples: int
    lost: int = 0


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every kind of data has to know.

    Args:
        seed: of the order and of the samples' own draws. global_batch: samples of an update over all ranks.
        micro_batch: samples of one pass at most; None: the share of this rank. rank, world: this process and how many
            train together. shuffle: a new order every epoch. training: False: the order is kept and a batch may be
            larger than the data. device: where batches go; None: they stay where they are.
        say: told what a person should know.
    """

    seed: int
    global_batch: int
    micro_batch: int | None = None
    rank: int = 0
    world: int = 1
    shuffle: bool = True
    training: bool = True
    device: torch.device | None = None
    say: Callable[[str], None] = _silent

    @property
    def share(self) -> int:
        """Samples of a full global batch that one rank gets at most."""
        return -(-self.global_batch // self.world)


class Data(ABC):
    """The samples of a training, in batches. One pass at a time: a new `epoch` ends the one before.

    `length` is the number of samples, None where it is unknown. `micro_batch` can be set at any time and holds for the
    next batch that is handed out.
    """

    kind: ClassVar[str]
    length: int | None

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.micro_batch = shape.micro_batch or shape.share

    @property
    def micro_batch(self) -> int:
        """Samples of one forward and backward pass at most."""
        return self._micro_batch

    @micro_batch.setter
    def micro_batch(self, size: int) -> None:
        if size < 1:
            raise UsageError(f"a micro-batch of {size} samples.", remedy="It is a whole number, at least 1.")
        self._micro_batch = size

    @property
    def steps(self) -> int | None:
        """Updates of an epoch; None where the number of samples is unknown."""
        return None if self.length is None else -(-self.length // self.shape.global_batch)

    @abstractmethod
    def epoch(self, epoch: int, cursor: int = 0) -> Iterator[Batch]:
        """What is left of an epoch once `cursor` samples of it (over all ranks) were consumed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides epoch and cursor; plain values."""
        return {"kind": self.kind, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataChangedError: it was taken from other data.
        """
        for what, now in (("kind", self.kind), ("length", self.length)):
            if state.get(what) != now:
                raise DataChangedError(
                    f"the data is not that of the checkpoint: its {what} was {state.get(what)} and is {now}.",
                    remedy="Resume with the same data, or start anew from the weights alone.",
                )

    def close(self) -> None:  # noqa: B027  (nothing to end is a fine answer)
        """End worker processes. A later `epoch` starts them again."""

    def _check(self) -> None:
        """Refuse data without samples, and a batch larger than the data."""
        if self.length == 0:
            raise EmptyDataError("the data has no samples.", remedy="Look at the path and the filter of the dataset.")
        if self.shape.training and self.length is not None and self.shape.global_batch > self.length:
            raise BatchTooLargeError(
                f"a global batch of {self.shape.global_batch} samples is larger than the data, {self.length} samples.",
                remedy=f"Set global_batch to {self.length} or less.",
            )

    def _check_cursor(self, cursor: int) -> None:
        if cursor < 0 or (self.length is not None and cursor > self.length):
            raise DataChangedError(
                f"the run stopped at sample {cursor} of an epoch of {self.length}.",
                remedy="Resume with the same data, or start anew from the weights alone.",
            )


def moved(tree: Any, device: torch.device | None) -> Any:
    """A batch on a device: tensors in tuples, lists and dicts, and whatever has a method `to`; the rest as it is."""
    if device is None:
        return tree
    if hasattr(tree, "to"):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, dict):
        return {key: moved(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[moved(value, device) for value in tree])
    if type(tree) in (tuple, list):
        return type(tree)([moved(value, device) for value in tree])
    return tree


def rows_of(batch: Any) -> int | None:
    """Samples in a collated batch: the first dimension of its first tensor, None where there is none."""
    import torch

    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else None
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((found for found in map(rows_of, values) if found is not None), None)


def divide(part: Part, micro_batch: int) -> list[Part]:
    """A micro-batch cut into smaller ones of nearly equal size, with weights to match. Tensors are views.

    Raises:
        DataError: its batch is not made of tensors and lists with one entry per sample.
    """
    size = len(part.rows)
    if size <= micro_batch:
        return [part]
    count = -(-size // micro_batch)
    edges = [size * piece // count for piece in range(count + 1)]
    return [
        Part(_between(part.batch, start, stop, size), part.weight * (stop - start) / size, part.rows[start:stop],
             min(part.n, stop - start))
        for start, stop in itertools.pairwise(edges)
    ]  # fmt: skip


def _between(tree: Any, start: int, stop: int, size: int) -> Any:
    import torch

    if isinstance(tree, torch.Tensor):
        if not tree.dim():
            return tree
        if len(tree) == size:
            return tree[start:stop]
    elif isinstance(tree, dict):
        return {key: _between(value, start, stop, size) for key, value in tree.items()}
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[_between(value, start, stop, size) for value in tree])
    elif type(tree) in (tuple, list):
        # default_collate makes a list of the texts of a batch, one a sample.
        if len(tree) == size and all(isinstance(item, (str, bytes, int, float, type(None))) for item in tree):
            return tree[start:stop]
        return type(tree)([_between(value, start, stop, size) for value in tree])
    elif isinstance(tree, (str, bytes, int, float, bool, type(None))):
        return tree
    what = f"a tensor of shape {tuple(tree.shape)}" if isinstance(tree, torch.Tensor) else f"a {type(tree).__name__}"
    raise DataError(
        f"a batch of {size} samples holds {what}, which cannot be cut into smaller micro-batches.",
        remedy="Set the micro-batch to a size that fits when the run starts.",
    )
