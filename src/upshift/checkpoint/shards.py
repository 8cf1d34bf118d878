"""Tensors that are spread over ranks: what one rank holds of them, and what stands for the whole one in a state.

Every rank writes its shards into its own file, under a name that is the same on all; where a shard lies in the whole
tensor is said in the header of that file, so that a file explains itself and nothing has to be collected in one place.

    header of rank-1-of-2.safetensors     "model.weight": {"dtype": "F32", "shape": [3, 8], ...}
      its __metadata__                    "shards": {"model.weight": [[6, 8], [3, 0]]}     whole shape, offset
    state of rank 0                       {"spread": "model.weight", "shape": [6, 8]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

#: The key of the places in a file's `__metadata__`.
KEY = "shards"

_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
_Facts = dict[str, tuple[list[_Natural], list[_Natural]]]


@dataclass(frozen=True)
class Box:
    """A block of a tensor: the index of its first element, and its shape."""

    offset: Shape
    shape: Shape

    @property
    def count(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    def common(self, other: Box) -> Box | None:
        """What lies in both; None where nothing does."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        high = tuple(min(a + n, b + m) for a, n, b, m in ends)
        if any(first >= last for first, last in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(last - first for first, last in zip(low, high, strict=True)))

    def inside(self, other: Box) -> tuple[slice, ...]:
        """Where it lies in `other`, as an index."""
        starts = [a - b for a, b in zip(self.offset, other.offset, strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))


def whole(shape: Shape) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a tensor: its block (any device), the shape of the whole, the index of its first element.

    A rank without any of it may hold a shard of no elements, or none.
    """

    tensor: torch.Tensor
    shape: Shape
    offset: Shape

    @property
    def box(self) -> Box:
        """Where it lies in the whole."""
        return Box(self.offset, tuple(self.tensor.shape))


@dataclass(frozen=True)
class Spread:
    """Stands in a state for a tensor whose shards are written under `name`; `shape` is that of the whole."""

    name: str
    shape: Shape


def to_text(places: Mapping[str, tuple[Shape, Shape]]) -> str:
    """Name -> (shape of the whole, offset), for the header of a file."""
    return msgspec.json.encode({name: [list(shape), list(offset)] for name, (shape, offset) in places.items()}).decode()


def from_text(text: str, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, Box]]:
    """Name -> (shape of the whole, block of it) of the shards of one file.

    Args:
        text: as `to_text` wrote it.
        shapes: of the tensors that are in the file.

    Raises:
        CheckpointError: it is not so, or a shard does not lie in its tensor.
    """
    try:
        told = msgspec.json.decode(text, type=_Facts)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"its header does not say where its shards lie: {error!s:.200}.") from None
    found = {}
    for name, (shape, offset) in told.items():
        own = shapes.get(name)
        fits = own is not None and len(own) == len(shape) == len(offset) <= 64
        if own is None or not fits or any(a + n > m for a, n, m in zip(offset, own, shape, strict=True)):
            raise CheckpointError(f"{name!r:.80} is no part of a tensor of shape {shape!s:.80}.")
        found[name] = tuple(shape), Box(tuple(offset), own)
    return found
