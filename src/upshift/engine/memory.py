"""Running out of memory: told apart from other errors in this one place, and what follows from it."""

from __future__ import annotations

import errno

#: What says so in an ordinary RuntimeError: torch's CPU allocator, C++, oneDNN, NVIDIA's libraries (which have memory
#: of their own beside torch's). oneDNN says the same of a kernel it does not have; halving then ends at one sample with
#: that error.
_SAYINGS = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out: on an accelerator, in an allocator of the host, or in Python."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAYINGS)


def smaller(micro_batch: int) -> int | None:
    """The micro-batch to go on with, at the same global batch; None where it cannot be smaller."""
    return (micro_batch + 1) // 2 if micro_batch > 1 else None
