"""A hook on one loader's iterators, for techniques that act on `loader_ready`.

The loader, its dataset, sampler and collate function stay the script's own objects. The hook lies on this one loader as
the attribute `_get_iterator`, which `DataLoader.__iter__` looks up.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable
from typing import Any


def taken(loader: Any) -> bool:
    """Whether something already stands in for this loader's iterators."""
    return "_get_iterator" in vars(loader)


def unsuited(collate: Any, batched: bool) -> str:
    """Why the batches of a fetcher are not what stacking the rows of tensors gives, or the empty string."""
    import torch
    from torch.utils.data import default_collate

    if not batched:
        return "it is not batched by the loader (batch_size=None)"
    if collate is not default_collate:
        return "it has a collate function of its own"
    if torch.get_default_device().type != "cpu":
        return "the default device is not the CPU"
    return ""


def _stock_getter(loader: Any) -> Any:
    return types.MethodType(type(loader)._get_iterator, loader)


class IteratorHook:
    """Builds the stock iterator and hands it to `exchange`, which may replace parts of it.

    A pickled or deep-copied loader gets its stock method back; a shallow copy shares this object, which then sees who
    calls and stands aside.
    """

    def __init__(self, loader: Any, exchange: Callable[[Any], None]) -> None:
        self._loader = weakref.ref(loader)
        self._exchange = exchange
        loader._get_iterator = self

    def __call__(self) -> Any:
        caller: Any = sys._getframe(1).f_locals.get("self")
        loader = self._loader()
        if loader is None or (caller is not loader and "_get_iterator" in getattr(caller, "__dict__", {})):
            return type(caller)._get_iterator(caller)
        iterator = type(loader)._get_iterator(loader)
        self._exchange(iterator)
        return iterator

    def remove(self) -> None:
        """The loader has its own method again."""
        loader = self._loader()
        if loader is not None and vars(loader).get("_get_iterator") is self:
            del loader._get_iterator

    def __reduce__(self) -> Any:
        return _stock_getter, (self._loader(),)
