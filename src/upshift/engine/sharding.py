"""Between the shards of FSDP2 (DTensor) and what a checkpoint knows: blocks of tensors, and a name for the whole.

A rank saves the blocks that it holds and loads the blocks that it needs, so that nothing is gathered and no rank needs
room for a model. A dimension is cut as torch does it: into blocks of ceil(n / ranks) from the first rank on, of which
the last ones may be short or empty.

Source: `torch.distributed.tensor` (Shard: "follows the torch.chunk(dim) semantic").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upshift.checkpoint.opened import Stored, held
from upshift.checkpoint.shards import Shape, Shard, Spread
from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def taken_apart(state: Any) -> tuple[Any, dict[str, Shard]]:
    """A state with a `Spread` in place of each sharded tensor, and this rank's shards under the names in these.

    No collective: nothing travels. Shards share memory with the training. A tensor that every rank holds whole stays.

    Raises:
        CheckpointError: a tensor is sharded in a way that is not known here.
    """
    found = _Shards()
    return found.without(state, ()), found.shards


class _Shards:
    def __init__(self) -> None:
        from torch.distributed.tensor import DTensor

        self._kind = DTensor
        self.shards: dict[str, Shard] = {}
        self._names: dict[Any, str] = {}

    def without(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, self._kind):
            return self._spread(value, path)
        if isinstance(value, dict):
            changed = {key: self.without(item, (*path, str(key))) for key, item in value.items()}
            # What holds no shard stays as it is, with its type.
            return changed if any(changed[key] is not value[key] for key in value) else value
        if isinstance(value, (list, tuple)):
            items = [self.without(item, (*path, str(i))) for i, item in enumerate(value)]
            return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
        return value

    def _spread(self, value: Any, path: tuple[str, ...]) -> Any:
        local, block = value.to_local().detach(), block_of(value)
        if block is None:
            return local
        name, whole = ".".join(path), tuple(value.shape)
        while name in self.shards:
            name += "'"
        offset, shape = block
        if shape != tuple(local.shape):
            raise CheckpointError(f"{name} is sharded unevenly: {tuple(local.shape)} here instead of {shape}.")
        if local.numel():
            # A weight that has two names is written once.
            name = self._names.setdefault((local.data_ptr(), shape, whole, local.stride(), local.dtype), name)
        self.shards[name] = Shard(local, whole, offset)
        return Spread(name, whole)


def block_of(tensor: Any) -> tuple[Shape, Shape] | None:
    """Offset and shape of what this rank holds of a DTensor; None where every rank holds all.

    Raises:
        CheckpointError: placements other than Shard and Replicate.
    """
    from torch.distributed.tensor import Replicate, Shard

    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    sharded = False
    for dimension, placement in enumerate(tensor.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise CheckpointError(f"a tensor is placed as {placement}, which checkpoints do not know.")
        mesh = tensor.device_mesh
        axis, rank = placement.dim % max(tensor.dim(), 1), mesh.get_local_rank(dimension)
        n = shape[axis]
        block = -(-n // mesh.size(dimension))
        first = min(rank * block, n)
        offset[axis], shape[axis] = offset[axis] + first, min(block, n - first)
        sharded = True
    return (tuple(offset), tuple(shape)) if sharded else None


def like(value: Any, own: Any) -> Any:
    """What a checkpoint holds as this rank needs it: its block, where `own` is sharded and has that shape.

    Args:
        value: a tensor, a `Stored`, a `Held`, or anything else with such inside.
        own: the tensor that it is for, or the parameter that it belongs to (a step count has another shape).

    Raises:
        CheckpointError, OSError: it cannot be read.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if not isinstance(value, (torch.Tensor, Stored, Held)):
        return whole(value)
    if not isinstance(own, DTensor) or tuple(value.shape) != tuple(own.shape):
        return whole(value)
    block = block_of(own)
    if block is None:
        part = whole(value)
    elif isinstance(value, torch.Tensor):
        part = value[tuple(slice(first, first + n) for first, n in zip(*block, strict=True))]
    else:
        part = value.part(*block)
    # A copy, so that no block keeps the whole tensor alive.
    part = part.to(own.device, copy=isinstance(value, torch.Tensor)).contiguous()
    return DTensor.from_local(
        part, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def whole(value: Any) -> Any:
    """The value with each tensor in it read; a shard that is held in memory stands for what this rank had."""
    return value.part() if isinstance(value, Held) else held(value)


class Held:
    """A shard kept in memory, for a training without a run folder: it fits the rank that it came from only."""

    def __init__(self, shard: Shard) -> None:
        self.shape = shard.shape
        self._tensor = shard.tensor

    def part(self, offset: Shape = (), shape: Shape = ()) -> torch.Tensor:
        """What this rank held, as a copy."""
        return self._tensor.clone()


def put_back(state: Any, shards: dict[str, Shard]) -> Any:
    """A state that `taken_apart` gave, with a `Held` in place of each `Spread`."""
    if isinstance(state, Spread):
        return Held(shards[state.name])
    if isinstance(state, dict):
        return {key: put_back(value, shards) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(put_back(value, shards) for value in state)
    return state
