"""Autocast around every call of a root module, put there from outside; outputs come back as float32.

What 16-bit precisions have in common. Only root calls are wrapped: a loss computed outside of the model stays in
float32. Casts of weights are not cached: a cast made under `no_grad` and found in the cache by a later forward of the
same region has no gradient (pytorch#112583), and whether a forward switches grad mode cannot be known.

Source: docs.pytorch.org/docs/stable/amp.html.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from upshift.sites.attempt import BeforeCall
from upshift.sites.protocol import BaseApplied, NoEffect

if TYPE_CHECKING:
    import torch


def in_float32(value: Any, low: torch.dtype) -> Any:
    """`value` with every tensor of dtype `low` in it as float32.

    Looks into tuples, named tuples, lists, dicts (also `ModelOutput`), dataclasses and `torch.distributions`. Returns
    the very same object where nothing had to change; containers are copied, never changed in place. The cast is
    differentiable.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype is low else value
    if isinstance(value, tuple):
        items = [in_float32(item, low) for item in value]
        if _same(items, value):
            return value
        plain = type(value) is tuple or not hasattr(value, "_fields")
        return type(value)(items) if plain else type(value)(*items)
    if isinstance(value, list):
        items = [in_float32(item, low) for item in value]
        if _same(items, value):
            return value
        changed = copy.copy(value)
        changed[:] = items
        return changed
    if isinstance(value, dict):
        entries = {key: in_float32(item, low) for key, item in value.items()}
        if all(entries[key] is item for key, item in value.items()):
            return value
        duplicate = copy.copy(value)
        for key, item in entries.items():
            duplicate[key] = item
        return duplicate
    if isinstance(value, torch.distributions.Distribution) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return _attributes_in_float32(value, low)
    return value


def _attributes_in_float32(value: Any, low: torch.dtype) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    else:
        names = list(vars(value))
    changed = {}
    for name in names:
        old = getattr(value, name)
        new = in_float32(old, low)
        if new is not old:
            changed[name] = new
    if not changed:
        return value
    duplicate = copy.copy(value)
    for name, new in changed.items():
        object.__setattr__(duplicate, name, new)  # frozen dataclasses too
    return duplicate


def _same(new: list[Any], old: tuple[Any, ...] | list[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


class AutocastApplied(BaseApplied):
    """Autocast to `dtype` around the calls of one root module."""

    def __init__(self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            module: has float32 parameters. dtype: `torch.bfloat16` or `torch.float16`.
        """
        self._name = str(dtype).removeprefix("torch.")
        self.note = f"{self._name} autocast around calls of {type(module).__name__}"
        self._device, self._dtype = device, dtype
        self._on = True
        self._tried: set[bool] = set()
        self._calls = 0
        self._skipped = 0
        self._refused = ""

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call it under autocast, unless the caller has one of its own or the first such call failed."""
        import torch

        kind = self._device.type
        if not self._on or self._refused:
            return call(*args, **kwargs)
        if torch.is_autocast_enabled(kind):
            self._skipped += 1
            return call(*args, **kwargs)
        # The first call in each mode is watched: an operation without a kernel of that dtype raises there.
        first = module.training not in self._tried
        before = BeforeCall(module, self._device) if first else None
        try:
            with torch.autocast(kind, dtype=self._dtype, cache_enabled=False):
                output = call(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if before is None:
                raise
            before.restore()
            output = call(*args, **kwargs)  # raises again where the script itself is at fault
            why = (str(error) or type(error).__name__).splitlines()[0]
            self._refused = f"the model does not run in {self._name} ({why})"
            return output
        self._tried.add(module.training)
        self._calls += 1
        return in_float32(output, self._dtype)

    def switch(self, on: bool) -> None:
        self._on = on

    def effect(self) -> NoEffect | None:
        if self._refused:
            return NoEffect(self._refused)
        if self._skipped and not self._calls:
            return NoEffect("the script calls the model inside its own autocast")
        return None

    def close(self) -> None:
        self._on = False
