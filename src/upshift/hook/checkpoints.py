"""Lets techniques act on what a checkpoint holds: tensors inside the plain containers of `state_dict`s.

`torch.save` is patched by `Watch`; safetensors here, once the script imports it. Objects of other types (a model that
is pickled whole) go to the file as they are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

from upshift.hook.imports import AfterImport
from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.sites import CheckpointApplied, Stage

_MAPPINGS = (dict, OrderedDict, defaultdict)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def as_written(stage: Stage, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a saving function, its first one (`name`) as techniques want it written.

    What cannot be walked through is written as the script has it.
    """
    acting = stage.checkpoints()
    if not acting or not (args or name in kwargs):
        return args, kwargs
    try:
        written = _Walk(acting).value(args[0] if args else kwargs[name])
    except Exception:
        return args, kwargs
    return ((written, *args[1:]), kwargs) if args else (args, {**kwargs, name: written})


def watch_safetensors(stage: Stage, patches: Patches) -> None:
    """Patch `safetensors.torch` when it is imported."""

    def imported(module: Any) -> None:
        for function in ("save", "save_file"):
            patches.set(module, function, _saving(stage, getattr(module, function)))

    AfterImport().on("safetensors.torch", imported)


def _saving(stage: Stage, original: Any) -> Any:
    def save(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = as_written(stage, "tensors", args, kwargs)
        return original(*args, **kwargs)

    return like(original, save)


class _Walk:
    """Copies containers only where something in them changes; what was shared stays shared."""

    def __init__(self, acting: tuple[CheckpointApplied, ...]) -> None:
        import torch

        self._acting = acting
        self._torch = torch
        self._kinds = (torch.Tensor, torch.nn.Parameter)
        self._containers: dict[int, Any] = {}
        self._memory: dict[tuple[Any, ...], Any] = {}

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._kinds:
            return self._tensor(value)
        if kind not in _MAPPINGS and kind not in (list, tuple):
            return value
        if id(value) in self._containers:
            return self._containers[id(value)]
        self._containers[id(value)] = value  # a container that holds itself ends here
        self._containers[id(value)] = found = self._container(value)
        return found

    def _container(self, value: Any) -> Any:
        if isinstance(value, dict):
            changed = {key: new for key, old in value.items() if (new := self.value(old)) is not old}
            if not changed:
                return value
            found = copy.copy(value)  # with its attributes: a state dict has `_metadata`
            found.update(changed)
            return found
        items = [self.value(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)

    def _tensor(self, tensor: Any) -> Any:
        if tensor.layout is not self._torch.strided:
            return tensor
        plain = tensor.detach()
        place = (plain.data_ptr(), plain.shape, plain.stride(), plain.dtype, plain.device)
        if place not in self._memory:
            new = plain
            for applied in self._acting:
                new = applied.written(new)
            self._memory[place] = None if new is plain else new
        new = self._memory[place]
        if new is None:
            return tensor
        if type(tensor) is not self._torch.Tensor:
            return self._torch.nn.Parameter(new, tensor.requires_grad)
        return new.requires_grad_() if tensor.requires_grad else new
