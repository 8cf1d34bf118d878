"""Named ranges of a step for a profiler that looks on: NVTX on CUDA, else the ranges of PyTorch's own profiler.

On demand only (`UPSHIFT_NVTX=1`): a range costs a microsecond or more at each end. Source: torch.cuda.nvtx, and
torch.profiler.record_function, whose ranges `torch.autograd.profiler.emit_nvtx` hands on.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from upshift.hook.patch import Patches

#: Environment variable: where it is 1, `run` draws ranges.
ON = "UPSHIFT_NVTX"


def wanted() -> bool:
    """Whether ranges were asked for."""
    return os.environ.get(ON) == "1"


def install(torch: Any, patches: Patches) -> None:
    """Draw `data`, `forward`, `backward` and `optimizer` around what the main thread does.

    Args:
        patches: takes the patches, over those that are there already.
    """
    named: Callable[[str], AbstractContextManager[Any]] = (
        torch.cuda.nvtx.range if torch.cuda.is_available() else torch.profiler.record_function
    )
    inside = threading.local()

    def outermost(name: str, original: Any) -> Any:
        """`original` within a range of this name, unless one is open: a submodule is part of its model's range."""

        @functools.wraps(original)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "name", "") or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            inside.name = name
            try:
                with named(name):
                    return original(*args, **kwargs)
            finally:
                inside.name = ""

        return ranged

    loaders = torch.utils.data.dataloader._BaseDataLoaderIter
    for owner, attribute, name in (
        (torch.nn.Module, "__call__", "forward"),
        (torch.autograd, "backward", "backward"),
        (loaders, "__next__", "data"),
    ):
        patches.set(owner, attribute, outermost(name, getattr(owner, attribute)))
    optimizer = torch.optim.Optimizer
    wrap = optimizer.profile_hook_step

    @functools.wraps(wrap)
    def profile_hook_step(step: Any) -> Any:
        return outermost("optimizer", wrap(step))

    # Each class of optimizer gets its step wrapped by this when its first object is made.
    patches.set(optimizer, "profile_hook_step", staticmethod(profile_hook_step))
