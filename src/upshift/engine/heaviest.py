"""The largest sample of a data set, and batches made of nothing else: what memory is tried with.

Where samples differ in length a batch is padded to its longest, so a batch of copies of the longest takes the most that
any batch can. Size is counted in elements. Data that cannot be looked through in `seconds` is looked at in evenly
spread places (a stream: at its beginning), and `seen` of `length` says how much that was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upshift.engine.tensors import as_fields
from upshift.errors import EmptyDataError

#: Samples of a stream that are kept to look for the largest.
STREAM = 256


@dataclass(frozen=True)
class Heaviest:
    """`index`: which sample (None: of a stream); `elements`: its size; `batch(n)`: n copies of it, collated."""

    index: int | None
    elements: int
    seen: int
    length: int | None
    batch: Callable[[int], Any]


def opened(data: Any) -> Any:
    """The data itself, where a job holds a function that returns it."""
    return data() if callable(data) and not hasattr(data, "__getitem__") and not hasattr(data, "__iter__") else data


def heaviest(data: Any, collate: Callable[[list[Any]], Any] | None, *, seconds: float = 5.0,
             index: int | None = None) -> Heaviest:  # fmt: skip
    """The largest sample of `data` (see `upshift.engine.data.open_data` for what that may be).

    Args:
        index: the sample is known already; nothing is looked through.

    Raises:
        EmptyDataError: there are no samples.
    """
    from torch.utils.data import IterableDataset, default_collate

    if not isinstance(data, IterableDataset) and collate is None and (fields := as_fields(data)) is not None:
        return _of_tensors(fields)
    together = collate or default_collate
    if isinstance(data, IterableDataset):
        sample, seen = _of_stream(data, seconds)
        return Heaviest(None, elements(sample), seen, None, lambda n: together([sample] * n))
    length = len(data)
    if not length:
        raise EmptyDataError("the data has no samples.", remedy="Look at the path and the filter of the dataset.")
    seen = 1
    if index is None:
        index, seen = _largest_index(data, length, seconds)
    chosen = data[index]
    return Heaviest(index, elements(chosen), seen, length, lambda n: together([chosen] * n))


def elements(sample: Any) -> int:
    """How much there is in a sample: numbers of arrays, characters of texts, items of everything else."""
    if hasattr(sample, "numel"):
        return int(sample.numel())
    if isinstance(sample, (str, bytes)):
        return len(sample)
    if isinstance(sample, dict):
        return sum(map(elements, sample.values()))
    if isinstance(sample, (tuple, list)):
        return sum(map(elements, sample))
    size = getattr(sample, "size", None)
    if isinstance(size, int):
        return size
    if isinstance(size, tuple) and len(size) == 2:  # an image of PIL
        return int(size[0] * size[1])
    return 1


def _of_tensors(fields: Any) -> Heaviest:
    """Rows are all alike."""
    import torch

    if not len(fields):
        raise EmptyDataError("the data has no samples.", remedy="Look at the path and the filter of the dataset.")

    def batch(n: int) -> Any:
        rows = torch.zeros(n, dtype=torch.int64) if fields.mapping is None else fields.mapping[:1].repeat(n)
        taken = tuple(item[rows.to(item.device)] for item in fields.tensors)
        if fields.keys is not None:
            return dict(zip(fields.keys, taken, strict=True))
        return taken[0] if fields.bare else taken

    size = sum(item[:1].numel() for item in fields.tensors)
    return Heaviest(0, size, len(fields), len(fields), batch)


def _of_stream(data: Any, seconds: float) -> tuple[Any, int]:
    best, most, seen, end = None, -1, 0, time.monotonic() + seconds
    for sample in data:
        seen += 1
        if (size := elements(sample)) > most:
            best, most = sample, size
        if seen >= STREAM or time.monotonic() > end:
            break
    if not seen:
        raise EmptyDataError("the stream has no samples.", remedy="Look at the path and the filter of the dataset.")
    return best, seen


def _largest_index(data: Any, length: int, seconds: float) -> tuple[int, int]:
    end = time.monotonic() + seconds
    best, most, seen = 0, -1, 0
    # About 64 places, then those between them, and so on: whenever time ends, what was seen is spread over the data.
    stride = 1 << max(length.bit_length() - 6, 0)
    done = 2 * stride * length
    while stride:
        for index in range(0, length, stride):
            if index % done == 0 and seen:
                continue
            seen += 1
            if (size := elements(data[index])) > most:
                best, most = index, size
            if time.monotonic() > end:
                return best, seen
        done, stride = stride, stride // 2
    return best, seen
