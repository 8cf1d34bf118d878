"""Running out of memory: told apart from other errors in this one place, and what follows from it."""

from __future__ import annotations

#: What torch's CPU allocator says, an ordinary RuntimeError.
_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out: on an accelerator, in torch's CPU allocator, or in Python."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU in str(error)


def smaller(micro_batch: int) -> int | None:
    """The micro-batch to go on with, at the same global batch; None where it cannot be smaller."""
    return (micro_batch + 1) // 2 if micro_batch > 1 else None
