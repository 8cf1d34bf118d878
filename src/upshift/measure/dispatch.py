"""One dispatch mode of ours on this thread: every operation of PyTorch goes through a function, in any stack frame."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

#: Given the mode, the operation, its arguments and keyword arguments; runs the operation and returns what came of it.
Handle = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]


def enter(handle: Handle) -> Any:
    """Put a mode on that hands operations to `handle`; None while the script has a mode of its own.

    Ours would then be taken off in the wrong order. Children of a fork are left alone.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

    if _get_current_dispatch_mode_stack():
        return None
    process = os.getpid()

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if os.getpid() != process or not isinstance(func, torch._ops.OpOverload):
                return func(*args, **kwargs)
            return handle(self, func, args, kwargs)

    mode: Any = Mode()  # type: ignore[no-untyped-call]
    mode.__enter__()
    return mode


def take_off(mode: Any) -> bool:
    """Remove `mode` from the stack of dispatch modes; those above it are lifted and put back. Whether it was there."""
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

    base: Any = TorchDispatchMode
    stack = _get_current_dispatch_mode_stack()
    if not any(item is mode for item in stack):
        return False
    above = []
    while (top := _get_current_dispatch_mode_stack()[-1]) is not mode:
        # The base class's own methods: what a subclass does on entry and exit must not be done again.
        base.__exit__(top, None, None, None)
        above.append(top)
    base.__exit__(mode, None, None, None)
    for item in reversed(above):
        base.__enter__(item)
    return True
