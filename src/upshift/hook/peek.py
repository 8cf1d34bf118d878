"""What the watch reads off modules, losses and the call stack, without changing anything."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any


def like(original: Any, wrapper: Any) -> Any:
    """Name, signature and documentation of what is wrapped."""
    return functools.update_wrapper(wrapper, original)


def has_parameters(module: Any) -> bool:
    """Whether there is a parameter anywhere in a module. `parameters()` hashes modules, which may refuse it."""
    try:
        waiting = [module]
        while waiting:
            item = waiting.pop()
            if any(value is not None for value in item._parameters.values()):
                return True
            waiting += [child for child in item._modules.values() if child is not None]
    except AttributeError:
        pass  # no module yet: its own `__init__` was not called
    return False


def shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors and arrays a model was called with; none where one of them has no plain shape."""
    try:
        return tuple(
            tuple(int(size) for size in item.shape)
            for item in (*args, *kwargs.values())
            if hasattr(item, "shape") and hasattr(item, "dtype")
        )
    except Exception:
        return ()


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Rows of the first tensor a model was called with, by custom its samples; NaN: there is none."""
    try:
        for item in (*args, *kwargs.values()):
            shape = getattr(item, "shape", None)
            if shape:
                return float(shape[0])
    except Exception:
        pass  # the script's own classes may raise anything when they are looked at
    return math.nan


def start_value(tensors: Any, tensor_type: Any) -> Any:
    """The scalar a backward call starts from: a float on the CPU, a detached tensor elsewhere; None if there is none.

    Several scalars count as their sum, which is what is differentiated.
    """
    if isinstance(tensors, tensor_type):
        try:
            value = tensors.item() if tensors.is_cpu else _scalar(tensors)
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        return value if type(value) is float or tensors.is_cpu is False else None
    if not isinstance(tensors, (tuple, list)) or not tensors:
        return None
    values = [start_value(item, tensor_type) if isinstance(item, tensor_type) else None for item in tensors]
    return None if any(value is None for value in values) else sum(values)


def _scalar(tensor: Any) -> Any:
    """A copy of a scalar on a device, without a graph; None if it is none.

    A copy, since it is read steps later: the script may have scaled its loss in place by then, and the output of a CUDA
    graph is overwritten when the graph runs again.
    """
    return tensor.detach().clone() if tensor.numel() == 1 and tensor.is_floating_point() else None


def running_steps() -> list[int]:
    """Ids of the optimizers whose `step` is under way above the one about to begin, read off the call stack."""
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename.endswith("optimizer.py"):
            arguments = frame.f_locals.get("args")
            if isinstance(arguments, tuple) and arguments:
                found.append(id(arguments[0]))
        frame = frame.f_back
    return found[1:]
