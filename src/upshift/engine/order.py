"""Which samples every update trains on: a function of the seed and the epoch, and of nothing else.

The order of an epoch is one permutation of all samples. A global batch is the next `global_batch` of them, whoever
reads them: ranks take consecutive slices of it, and cut their slice into micro-batches. So the number of ranks,
micro-batches and workers changes who reads a sample and never when it is trained on, and a position in an epoch is one
number: the samples consumed so far, by all ranks together (the cursor).

Weights. A micro-batch is trained with `loss * weight`, loss being the mean over its samples; ranks average their
gradients (as DistributedDataParallel does). With weight = world * n / global batch the result is the gradient of the
mean over the global batch, also for the incomplete batch at the end of an epoch and for ranks that get none of it.

Seeds are mixed by BLAKE2b (RFC 7693): nearby seeds and epochs give unrelated streams, the same on every machine. The
permutation is `torch.randperm` on the CPU, which is the same for the same torch version.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

#: What a seed is for; so that two purposes never share a stream.
ORDER, SAMPLE, COLLATE, LOADER = range(4)


def mix(*parts: int) -> int:
    """A seed of 63 bits from whole numbers (each modulo 2**64), stable over machines, versions and processes."""
    packed = struct.pack(f"<{len(parts)}Q", *[part & 0xFFFFFFFFFFFFFFFF for part in parts])
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def order(n: int, seed: int, epoch: int, shuffle: bool = True) -> torch.Tensor:
    """The order in which the samples of an epoch are trained on: int64, shape (n,). Global random state is not touched.

    Args:
        n: samples. seed, epoch: any whole numbers. shuffle: False keeps 0, 1, ..., n - 1.
    """
    import torch

    if not shuffle:
        return torch.arange(n, device="cpu")
    generator = torch.Generator(device="cpu")
    generator.manual_seed(mix(ORDER, seed, epoch))
    return torch.randperm(n, generator=generator, device="cpu")


class Span(NamedTuple):
    """One micro-batch of one rank: places `start` to `stop` of a global batch, of which `n` samples count.

    `n` is `stop - start`, or 0 where a rank has nothing to do and reads one sample with weight 0.
    """

    start: int
    stop: int
    n: int
    weight: float


@lru_cache(maxsize=512)
def spans(size: int, world: int = 1, rank: int = 0, micro_batch: int | None = None) -> tuple[Span, ...]:
    """How one rank cuts its share of a global batch into micro-batches.

    Shares and micro-batches are as equal as can be (they differ by one sample at most), so that none is much smaller
    than the others, which batch normalisation would feel.

    Args:
        size: samples of this global batch, at least 1. micro_batch: samples of a micro-batch at most; None: one.
    """
    low, high = size * rank // world, size * (rank + 1) // world
    count = high - low
    if not count:
        return (Span(0, 1, 0, 0.0),)
    pieces = -(-count // micro_batch) if micro_batch else 1
    edges = [low + count * piece // pieces for piece in range(pieces + 1)]
    return tuple(
        Span(start, stop, stop - start, world * (stop - start) / size) for start, stop in itertools.pairwise(edges)
    )


def batches(n: int, global_batch: int, cursor: int = 0) -> Iterator[tuple[int, int]]:
    """The global batches left in an epoch of `n` samples: (first place, samples). The last one may be smaller."""
    for start in range(cursor, n, global_batch):
        yield start, min(global_batch, n - start)


class Piece(NamedTuple):
    """One micro-batch of one rank: indices of its samples (int64), how many of them count, and its weight."""

    indices: torch.Tensor
    n: int
    weight: float


def pieces(
    rows: torch.Tensor,
    *,
    global_batch: int,
    world: int = 1,
    rank: int = 0,
    micro_batch: int | None = None,
    cursor: int = 0,
) -> Iterator[list[Piece]]:
    """The micro-batches of one rank for every global batch left in an epoch.

    Args:
        rows: the order of the epoch, shape (n,). cursor: samples consumed so far, by all ranks.
    """
    for start, size in batches(len(rows), global_batch, cursor):
        yield [
            Piece(rows[start + span.start : start + span.stop], span.n, span.weight)
            for span in spans(size, world, rank, micro_batch)
        ]
