"""Weights in a folder of torch.distributed.checkpoint (DCP): read without unpickling its index, written by torch.

The index `.metadata` is a pickle of dataclasses (torch/distributed/checkpoint/metadata.py). Only what it says is used:
name -> dtype, shape, and for each chunk its place in the tensor, a file beside the index, and the bytes in that file,
which are a file of torch.save.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.checkpoint.disk import Disk, fill, opened, small
from upshift.checkpoint.opcodes import MAX_BYTES, Named, look
from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata."


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a DCP folder by name, on the host; entries that are no tensors are left out.

    Raises:
        CheckpointError: no such folder, or an index that does not fit its files.
        OSError: it cannot be read.
    """
    try:
        index, _ = look(small(Disk(), folder, INDEX, MAX_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no folder of torch.distributed.checkpoint (it has no {INDEX}).") from None
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    try:
        wanted = _shapes(index, sum(sizes.values()))
        return _filled(folder, index, wanted, sizes)
    except (AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is not as torch writes it: {error!s:.120}.") from None


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a DCP folder from one process.

    Raises:
        OSError: it cannot be written.
    """
    import warnings

    from torch.distributed.checkpoint.state_dict_saver import save

    folder.mkdir(mode=0o700)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of writing from one process, which is what we want
        save(dict(weights), checkpoint_id=folder, no_dist=True)


def _shapes(index: Named, room: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Name -> (dtype, shape), all together no larger than the files."""
    import torch

    found: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, entry in index.state["state_dict_metadata"].items():
        if entry.name != _METADATA + "TensorStorageMetadata":
            continue
        dtype = getattr(torch, entry.state["properties"].state[0].name.removeprefix("torch."))
        shape = _sizes(entry.state["size"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name!r:.80} has no dtype")
        room -= math.prod(shape) * dtype.itemsize
        if room < 0:
            raise CheckpointError("its index claims more bytes than its files have.")
        found[str(name)] = (dtype, shape)
    return found


def _filled(
    folder: Path, index: Named, wanted: dict[str, tuple[torch.dtype, list[int]]], sizes: dict[str, int]
) -> dict[str, torch.Tensor]:
    import torch

    from upshift.checkpoint.foreign import check_pt

    found: dict[str, torch.Tensor] = {}
    covered = dict.fromkeys(wanted, 0)
    for place, info in index.state["storage_data"].items():
        name = place.state["fqn"]
        if name not in wanted:
            continue
        dtype, shape = wanted[name]
        file, start, length = (info.state[key] for key in ("relative_path", "offset", "length"))
        if file not in sizes or min(start, length) < 0 or start + length > sizes[file]:
            raise CheckpointError(f"{name!r:.80} lies outside the files of the folder.")
        if info.state.get("transform_descriptors"):
            raise CheckpointError(f"{name!r:.80} is compressed or encrypted; that is not read here.")
        with opened(folder, file) as fd:
            os.lseek(fd, start, os.SEEK_SET)
            raw = bytearray(length)
            fill(Disk(), fd, memoryview(raw))
        stream = io.BytesIO(raw)
        check_pt(stream)
        stream.seek(0)
        chunk = torch.load(stream, map_location="cpu", weights_only=True)
        offset = _sizes(place.state["offset"]) if place.state.get("offset") is not None else [0] * len(shape)
        if name not in found:
            found[name] = torch.zeros(shape, dtype=dtype)
        part = found[name][tuple(slice(o, o + n) for o, n in zip(offset, chunk.shape, strict=True))]
        if part.shape != chunk.shape:
            raise CheckpointError(f"a part of {name!r:.80} lies outside of it.")
        part.copy_(chunk)
        covered[name] += chunk.numel()
    for name, (_, shape) in wanted.items():
        if name not in found or covered[name] < math.prod(shape):
            raise CheckpointError(f"{name!r:.80} is not complete in the folder.")
    return found


def _sizes(value: Any) -> list[int]:
    items = list(value.args[0]) if isinstance(value, Named) and value.args else list(value)
    if not all(type(item) is int and 0 <= item < 2**60 for item in items):
        raise ValueError("a size is no natural number")
    return items
