"""What a job trains on, opened: tensors, a map-style dataset or a stream, all as batches of one rank.

data = open_data(job.train_data, seed=job.seed, global_batch=512)
for batch in data.epoch(epoch, cursor):
    for part in batch.parts:
        (loss(model(part.batch)) * part.weight).backward()
    ...                                      # step
    cursor += batch.samples
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from upshift.engine.batches import Batch, Data, Part, Shape, divide
from upshift.engine.loading import MapData
from upshift.engine.streams import Agree, StreamData
from upshift.engine.tensors import TensorData, as_fields
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "Data", "Part", "Shape", "divide", "open_data"]


def _nobody(text: str) -> None:
    pass


def open_data(
    data: Any,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int | None = None,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    training: bool = True,
    collate: Callable[[list[Any]], Any] | None = None,
    device: torch.device | str | None = None,
    loader: dict[str, Any] | None = None,
    draws: bool = True,
    budget: int | None = None,
    sharded: bool = False,
    on_args: Callable[[dict[str, Any]], None] | None = None,
    on_loader: Callable[[Any], None] | None = None,
    agree: Agree | None = None,
    say: Callable[[str], None] = _nobody,
) -> Data:
    """The data of a job as batches of one rank.

    Args:
        data: tensors of one length (a tuple, a dict, a TensorDataset or a Subset of one), a map-style dataset, an
            iterable dataset, or a function without arguments that returns one of these.
        seed, global_batch, micro_batch, rank, world, shuffle, training, say: see `Shape`.
        collate: puts samples together; tensors are then read sample by sample.
        device: where batches go; None: they stay where they are.
        loader: arguments of torch's DataLoader that do not change what is trained (`num_workers`, ...).
        draws: False for a dataset known to draw no random numbers in `__getitem__`.
        budget: samples that may be unreadable; None: 10, or 0.1 % of the data.
        sharded: an iterable dataset gives every rank its own samples.
        on_args: is handed the arguments of the DataLoader and may change them. on_loader: is handed the loader. Neither
            is called for tensors, which are read without a loader.
        agree: sums a list of numbers over the ranks; needed for iterable datasets with several ranks.

    Raises:
        EmptyDataError, BatchTooLargeError: nothing can be trained with it.
        UsageError: it is none of these.
    """
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    # A class has the methods of its objects, but builds one when it is called.
    if isinstance(data, type) or (
        callable(data) and not hasattr(data, "__getitem__") and not hasattr(data, "__iter__")
    ):
        data = data()
    where = torch.device(device) if device is not None else None
    if where is not None and where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(
        seed=seed, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world=world, shuffle=shuffle,
        training=training, device=where, say=say,
    )  # fmt: skip
    if isinstance(data, DataLoader):
        raise UsageError(
            "the data is a DataLoader; batches are made here.", remedy="Hand over its dataset (loader.dataset)."
        )
    if isinstance(data, IterableDataset):
        return StreamData(
            data, shape, collate=collate, loader=loader, sharded=sharded, on_args=on_args, on_loader=on_loader,
            agree=agree,
        )  # fmt: skip
    if collate is None and (fields := as_fields(data)) is not None:
        return TensorData(fields, shape)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes, dict)):
        return MapData(
            data, shape, collate=collate, loader=loader, draws=draws, budget=budget, on_args=on_args,
            on_loader=on_loader,
        )  # fmt: skip
    raise UsageError(
        f"data of type {type(data).__name__} cannot be trained on.",
        remedy="Give a dataset with __len__ and __getitem__, an IterableDataset, or a tuple or dict of tensors.",
    )
