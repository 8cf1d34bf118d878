"""Data that is in memory as tensors: batches are gathered by whole blocks, and every micro-batch is a view.

A DataLoader over a `TensorDataset` reads sample by sample in Python and stacks what it read. Here one gather serves as
many updates as fit into `BLOCK` bytes, and the cost of an update is that of making its views.

Blocks begin at fixed places of the epoch, so that a batch lies at the same offset in memory whether the run was
resumed or not: some CPU kernels round differently for differently aligned memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from upshift.engine.batches import Batch, Data, Part, Shape
from upshift.engine.order import order, spans
from upshift.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

#: Bytes gathered at once, if more than one batch fits into them. Larger blocks gained nothing (measured from 256 KiB to
#: 64 MiB on two cores) and leave the caches.
BLOCK = 2**20

#: Batches in a block at most, so that their views stay few.
MOST = 1024

#: Of the free memory of an accelerator, what the data may take to be kept there.
SHARE = 0.25


class Fields:
    """Tensors of one length, the first dimension, as a tuple or under names; `mapping` are the rows used, None: all."""

    def __init__(
        self, tensors: tuple[torch.Tensor, ...], keys: tuple[Any, ...] | None, mapping: torch.Tensor | None, bare: bool
    ) -> None:
        self.tensors, self.keys, self.mapping, self.bare = tensors, keys, mapping, bare

    def __len__(self) -> int:
        return len(self.tensors[0]) if self.mapping is None else len(self.mapping)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return sum(item.element_size() * item[:1].numel() for item in self.tensors)


def as_fields(data: Any) -> Fields | None:
    """Data as fields if it is tensors (or numpy arrays): a tensor, a tuple or dict of them, a `TensorDataset`, or a
    `Subset` of one; None for anything else.

    Raises:
        UsageError: tensors of different lengths, without a first dimension, or that need gradients.
    """
    import torch
    from torch.utils.data import Subset, TensorDataset

    mapping: torch.Tensor | None = None
    while type(data) is Subset:
        chosen = torch.as_tensor(data.indices, dtype=torch.int64)
        mapping = chosen if mapping is None else chosen[mapping]
        data = data.dataset
    keys, bare = None, False
    if type(data) is TensorDataset:
        found: tuple[Any, ...] = tuple(data.tensors)
    elif mapping is not None:
        return None
    elif type(data) is tuple:
        found = data
    elif isinstance(data, dict):
        found, keys = tuple(data.values()), tuple(data)
    elif _is_array(data):
        found, bare = (data,), True
    else:
        return None
    if not found or not all(map(_is_array, found)):
        return None
    tensors = tuple(torch.as_tensor(item) for item in found)
    _refuse(tensors)
    return Fields(tensors, keys, mapping, bare)


def _is_array(item: Any) -> bool:
    import torch

    if isinstance(item, torch.Tensor):
        return item.layout is torch.strided and not item.is_nested
    kind = getattr(getattr(item, "dtype", None), "kind", "")
    return type(item).__module__ == "numpy" and kind in tuple("biufc")


def _refuse(tensors: tuple[torch.Tensor, ...]) -> None:
    if any(not item.dim() for item in tensors):
        raise UsageError(
            "the data holds a tensor without dimensions.", remedy="The first dimension counts the samples."
        )
    lengths = [len(item) for item in tensors]
    if len(set(lengths)) > 1:
        raise UsageError(
            f"the tensors of the data have different lengths: {lengths}.",
            remedy="The first dimension of each counts the samples.",
        )
    if any(item.requires_grad for item in tensors):
        raise UsageError("the data holds a tensor that requires a gradient.", remedy="Hand over tensor.detach().")


def _split(tensor: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    import torch

    return torch.split(tensor, sizes)  # type: ignore[no-any-return,no-untyped-call]


class TensorData(Data):
    """Batches of tensors that are in memory. `batch` is a tuple, a dict with the same keys, or one tensor."""

    kind = "tensors"

    def __init__(self, fields: Fields, shape: Shape) -> None:
        super().__init__(shape)
        self.length: int = len(fields)
        self.fields = fields
        self._home: tuple[torch.Tensor, ...] | None = None
        self._check()

    def epoch(self, epoch: int, cursor: int = 0) -> Iterator[Batch]:
        """What is left of an epoch once `cursor` samples of it were consumed."""
        self._check_cursor(cursor)
        shape, length, most = self.shape, self.length, self.shape.global_batch
        shuffled = shape.shuffle and shape.training
        rows = order(length, shape.seed, epoch) if shuffled else None
        # A view of the data itself where nothing is to be picked out of it.
        views = not shuffled and shape.world == 1 and self.fields.mapping is None
        versions = [item._version for item in self._at_home()] if views else []
        copied = not views or shape.device not in (None, self._at_home()[0].device)
        per_block = max(1, min(MOST, BLOCK // max(1, self.fields.row_bytes * shape.share))) if copied else MOST
        first = cursor % most
        full = (length - first) // most
        number = (cursor - first) // most
        while first + number * most < length:
            micro = self.micro_batch
            begin = number - number % per_block
            if number < full:
                block = self._block(rows, first + begin * most, min(per_block, full - begin), most, views)
            else:
                begin = number
                block = self._block(rows, first + number * most, 1, length - first - number * most, views)
            for place, batch in enumerate(block):
                if begin + place < number:
                    continue
                yield batch
                number += 1
                if self._micro_batch != micro:
                    break
            if views and versions != [item._version for item in self._at_home()]:
                raise DataError(
                    "the training changed its data in place.", remedy="Copy a batch (x = x.clone()) before changing it."
                )

    def _block(self, rows: torch.Tensor | None, start: int, count: int, size: int, views: bool) -> Iterator[Batch]:
        """`count` global batches of `size` samples each, from place `start` of the epoch; `rows` None: in order."""
        import torch

        layout = spans(size, self.shape.world, self.shape.rank, self._micro_batch)
        low, high = layout[0].start, layout[-1].stop
        stop = start + count * size
        picked = torch.arange(start, stop, device="cpu") if rows is None else rows[start:stop]
        if high - low < size:
            picked = picked.view(count, size)[:, low:high].reshape(-1)
        if views:
            fields = [self._there(item[start:stop]) for item in self._at_home()]
        else:
            source = picked if self.fields.mapping is None else self.fields.mapping[picked]
            fields = [self._there(item.index_select(0, source.to(item.device))) for item in self._at_home()]
        sizes = [span.stop - span.start for span in layout] * count
        cut = zip(_split(picked, sizes), zip(*[_split(item, sizes) for item in fields], strict=True), strict=True)
        keys, bare = self.fields.keys, self.fields.bare
        if keys is None and not bare and len(layout) == 1:
            weight, n = layout[0].weight, layout[0].n
            for own, values in cut:
                yield Batch([Part(values, weight, own, n)], size, 0)
            return
        for _ in range(count):
            parts = []
            for span in layout:
                own, values = next(cut)
                batch = values[0] if bare else values if keys is None else dict(zip(keys, values, strict=True))
                parts.append(Part(batch, span.weight, own, span.n))
            yield Batch(parts, size, 0)

    def _there(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows on the device of the training."""
        device = self.shape.device
        if device is None or rows.device == device:
            return rows
        pinned = rows.pin_memory() if device.type == "cuda" and rows.device.type == "cpu" else rows
        return pinned.to(device, non_blocking=True)

    def _at_home(self) -> tuple[torch.Tensor, ...]:
        """The tensors where batches are gathered from: on the device of the training, if they fit there."""
        import torch

        if self._home is None:
            tensors, device = self.fields.tensors, self.shape.device
            if device is not None and device.type == "cuda":
                size = sum(item.numel() * item.element_size() for item in tensors if item.device.type == "cpu")
                if size <= SHARE * torch.cuda.mem_get_info(device)[0]:
                    tensors = tuple(item.to(device) for item in tensors)
            self._home = tensors
        return self._home

    def close(self) -> None:
        """Free what was put on an accelerator."""
        self._home = None
