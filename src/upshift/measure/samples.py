"""Samples of fixed form, kept as rows of one memory map and gathered a batch at a time.

The batches are those of `torch.utils.data.default_collate`, to the bit: same containers, dtypes, shapes and memory
format, in memory of their own. Rows are moved as integers, so that NaN payloads and negative zeros survive.
"""

from __future__ import annotations

import mmap
import operator
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Regions of the map begin at multiples of this many bytes (a cache line).
ALIGN = 64


class Unfit(Exception):
    """A sample that cannot be kept as a row of fixed size; the message says why."""


def flatten(sample: Any) -> tuple[Any, list[Any]]:
    """The form of a sample and its leaves in order.

    The form is a nested tuple that two samples share exactly if `default_collate` treats them alike and their rows have
    the same size.

    Raises:
        Unfit: a string, an unknown class, a tensor that is sparse, on another device or needs a gradient.
    """
    leaves: list[Any] = []
    return _form(sample, leaves), leaves


def _form(item: Any, leaves: list[Any]) -> Any:
    import torch

    kind = type(item)
    if kind is torch.Tensor:
        if item.layout is not torch.strided or item.is_nested or item.is_quantized or item.is_conj() or item.is_neg():
            raise Unfit("a tensor that is not plain and dense")
        if item.device.type != "cpu":
            raise Unfit(f"a tensor on {item.device}")
        if item.requires_grad:
            raise Unfit("a tensor that requires a gradient")
        leaves.append(item)
        return ("tensor", item.dtype, item.shape)
    if kind is int or kind is float or kind is bool:
        leaves.append(item)
        return kind
    if kind is tuple or kind is list:
        return (kind, tuple([_form(part, leaves) for part in item]))
    if kind is dict or kind is OrderedDict:
        if not all(type(key) in (str, int) for key in item):
            raise Unfit("a dict with keys that are neither text nor whole numbers")
        return (kind, tuple(item), tuple([_form(part, leaves) for part in item.values()]))
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return (kind, tuple([_form(part, leaves) for part in item]))
    return _numpy_form(item, leaves)


def _numpy_form(item: Any, leaves: list[Any]) -> Any:
    import numpy as np

    if type(item) in (np.ndarray, np.memmap):
        if item.dtype.kind not in "biufc":
            raise Unfit(f"a numpy array of {item.dtype}")
        leaves.append(item)
        return ("array", item.dtype.str, item.shape)
    if isinstance(item, (np.bool_, np.number)):
        leaves.append(item)
        return ("scalar", type(item))
    if isinstance(item, (str, bytes)):
        raise Unfit("text, which has no fixed size")
    raise Unfit(f"a {type(item).__name__}")


def unflatten(form: Any, leaves: Iterator[torch.Tensor]) -> Any:
    """A batch of this form from its collated leaves, in the containers `default_collate` would give."""
    if not isinstance(form, tuple) or form[0] in ("tensor", "array", "scalar"):
        return next(leaves)
    kind = form[0]
    if kind is dict or kind is OrderedDict:
        return kind((key, unflatten(part, leaves)) for key, part in zip(form[1], form[2], strict=True))
    parts = [unflatten(part, leaves) for part in form[1]]
    # default_collate turns tuples into lists, and keeps lists and named tuples.
    return parts if kind in (tuple, list) else kind(*parts)


def batch_leaves(form: Any, batch: Any) -> list[torch.Tensor]:
    """The tensors of a collated batch of this form, in order."""
    if not isinstance(form, tuple) or form[0] in ("tensor", "array", "scalar"):
        return [batch]
    kind = form[0]
    parts = [batch[key] for key in form[1]] if kind is dict or kind is OrderedDict else list(batch)
    below = form[2] if kind is dict or kind is OrderedDict else form[1]
    return [leaf for inner, part in zip(below, parts, strict=True) for leaf in batch_leaves(inner, part)]


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Same dtype, shape, strides and bits (NaN equals itself, -0.0 differs from 0.0)."""
    import numpy as np

    if first.dtype != second.dtype or first.shape != second.shape or first.stride() != second.stride():
        return False
    # numpy compares in this thread; see Field for why that matters.
    return np.array_equal(_bytes(first), _bytes(second))


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def checker(form: Any) -> Callable[[Any], bool]:
    """A quick test of whether a sample has this form (about a microsecond a leaf).

    Device, layout and gradients of tensors are left to a check of the collated batch.
    """
    import numpy as np
    import torch

    if not isinstance(form, tuple):
        return lambda item: type(item) is form
    kind = form[0]
    if kind == "tensor":
        dtype, shape, tensor = form[1], form[2], torch.Tensor
        return lambda item: type(item) is tensor and item.dtype is dtype and item.shape == shape
    if kind == "array":
        name, shape = form[1], form[2]
        return lambda item: type(item) in (np.ndarray, np.memmap) and item.dtype.str == name and item.shape == shape
    if kind == "scalar":
        return lambda item: type(item) is form[1]
    if kind is dict or kind is OrderedDict:
        keys, parts = form[1], tuple(map(checker, form[2]))
        return lambda item: type(item) is kind and tuple(item) == keys and all(map(operator.call, parts, item.values()))
    inner = tuple(map(checker, form[1]))
    return lambda item: type(item) is kind and len(item) == len(inner) and all(map(operator.call, inner, item))


class Field:
    """One leaf of the form: rows of `shape` and `dtype` in the map, moved as the widest fitting integers.

    Rows are moved by numpy, in one thread: a parallel gather of a few hundred KiB costs more in waking threads than in
    copying, and many times more where other processes want the cores.

    Args:
        batch: a collated batch of this leaf, shape (b, *shape), from which dtype, shape and memory format are taken.

    Raises:
        Unfit: an empty leaf, another device, or strides that a gather does not give.
    """

    def __init__(self, batch: torch.Tensor) -> None:
        import torch

        if batch.device.type != "cpu" or batch.layout is not torch.strided:
            raise Unfit(f"a batch on {batch.device}")
        self.dtype, self.shape = batch.dtype, tuple(batch.shape[1:])
        self.last = not batch.is_contiguous()
        if self.last and not (batch.dim() == 4 and batch.is_contiguous(memory_format=torch.channels_last)):
            raise Unfit("batches with unusual strides")
        self.row_bytes = batch.element_size() * batch[0].numel()
        if self.row_bytes == 0:
            raise Unfit("an empty tensor")
        widths = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
        self._word = next(word for size, word in widths if self.row_bytes % size == 0)
        self._rows: Any = None

    def fits(self, batch: torch.Tensor) -> bool:
        """Whether a collated batch of this leaf has the dtype, shape and memory format of the rows."""
        import torch

        if batch.dtype is not self.dtype or tuple(batch.shape[1:]) != self.shape or batch.requires_grad:
            return False
        if batch.device.type != "cpu" or batch.layout is not torch.strided:
            return False
        return batch.is_contiguous(memory_format=torch.channels_last) if self.last else batch.is_contiguous()

    def place(self, region: Any) -> None:
        """Take a region of the map: a numpy array of count * row_bytes bytes."""
        name = str(self._word).rpartition(".")[2]
        self._rows = region.view(name).reshape(region.size // self.row_bytes, -1)

    def _words(self, batch: torch.Tensor) -> Any:
        """The memory of a batch as a numpy array of words, shape (b, words)."""
        dense = batch.permute(0, 2, 3, 1) if self.last else batch
        return dense.view(len(batch), -1).view(self._word).numpy()

    def put(self, index: Any, batch: torch.Tensor) -> None:
        """Store a batch (b, *shape) as rows `index` (numpy int64, b)."""
        self._rows[index] = self._words(batch)

    def get(self, index: Any) -> torch.Tensor:
        """Rows `index` (numpy int64, b) as a new batch (b, *shape) that is no view of anything."""
        import numpy as np
        import torch

        order = torch.channels_last if self.last else torch.contiguous_format
        batch = torch.empty((len(index), *self.shape), dtype=self.dtype, device="cpu", memory_format=order)
        np.take(self._rows, index, axis=0, out=self._words(batch), mode="clip")
        return batch


class Rows:
    """`count` samples of one form in a memory map, freed with the last reference to it.

    On POSIX the file is unlinked as soon as it is mapped, so that even a killed process leaves nothing behind; its
    blocks are reserved first, since writing to a map on a full disk would kill the process.
    """

    def __init__(self, form: Any, fields: list[Field], count: int) -> None:
        self.form, self.fields, self.count = form, fields, count
        self.bytes = sum(-(-field.row_bytes * count // ALIGN) * ALIGN for field in fields)
        self.path = ""

    def map(self, folder: str) -> None:
        """Create the file in `folder` and map it.

        Raises:
            OSError: no room, or the folder cannot be written to.
        """
        import numpy as np

        Path(folder or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
        handle, self.path = tempfile.mkstemp(prefix="samples-", suffix=".map", dir=folder or None)
        try:
            _reserve(handle, self.bytes)
            flat = np.frombuffer(mmap.mmap(handle, self.bytes), dtype=np.uint8)
        finally:
            os.close(handle)
            if os.name == "posix":
                Path(self.path).unlink(missing_ok=True)
        offset = 0
        for field in self.fields:
            size = field.row_bytes * self.count
            field.place(flat[offset : offset + size])
            offset += -(-size // ALIGN) * ALIGN

    def fits(self, leaves: list[torch.Tensor]) -> bool:
        """Whether a collated batch can be stored (with the quick `checker` on its samples)."""
        return all(field.fits(leaf) for field, leaf in zip(self.fields, leaves, strict=True))

    def put(self, index: Any, leaves: list[torch.Tensor]) -> None:
        """Store collated leaves, each (b, ...), as samples `index` (b)."""
        for field, leaf in zip(self.fields, leaves, strict=True):
            field.put(index, leaf)

    def get(self, index: Any) -> list[torch.Tensor]:
        """Samples `index` (b) as new collated leaves."""
        return [field.get(index) for field in self.fields]

    def batch(self, leaves: list[torch.Tensor]) -> Any:
        """Leaves in the containers of the form."""
        return unflatten(self.form, iter(leaves))


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    block = bytes(2**20)
    for offset in range(0, size, len(block)):
        os.write(handle, block[: min(len(block), size - offset)])


def memory_free() -> int:
    """Bytes of memory this process could still take: what the machine or its control group has left."""
    import psutil

    from upshift.hardware import machine

    memory = psutil.virtual_memory()
    limit = machine.memory_limit()
    if limit >= memory.total:
        return int(memory.available)
    # What other processes of the group hold is not seen; the caller halves the figure.
    return max(0, min(int(memory.available), limit - int(psutil.Process().memory_info().rss)))
