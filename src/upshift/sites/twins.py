"""Tensors that stand for a tensor on the CPU and know a quicker way to its copy on a device.

A technique that brings batches to the device ahead of time cannot hand the script a tensor that lies there: scripts
also print labels, draw noise of the input's shape, or call `.numpy()`, before they move a batch or instead. A twin is a
CPU tensor to the script. Only `.to(device)` and `.cuda()`, without another dtype or memory format, are answered by the
prepared copy, once; everything else is done with the CPU tensor, and after anything that might have written to it there
is no quicker way any more.

Source: docs.pytorch.org/docs/stable/notes/extending.html, "Extending torch Python API" (`__torch_function__`) and
"Extending torch native API" (`__torch_dispatch__`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """What a twin stands for."""

    opened: bool
    """Whether the CPU tensor has been handed out: it is the truth from then on."""

    def host(self) -> torch.Tensor:
        """The CPU tensor itself, always the same one. Waits for a copy that is still being read from it."""

    def there(self, device: torch.device) -> torch.Tensor | None:
        """The copy on `device`, ready for work queued there from now on; None where there is none."""


#: Properties and methods that only tell what kind of tensor it is.
_READS = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "requires_grad", "is_leaf", "is_sparse")
_ASKS = ("size", "dim", "numel", "nelement", "element_size", "stride", "is_floating_point", "is_complex")


@cache
def _twin() -> Any:
    """The class; torch is not imported before it is needed."""
    import torch

    harmless = {getattr(torch.Tensor, name).__get__ for name in _READS}
    harmless |= {getattr(torch.Tensor, name) for name in (*_ASKS, "__len__")}
    moves = (torch._C.TensorBase.to, torch._C.TensorBase.cuda)  # what is called below any wrapper

    class Twin(torch.Tensor):
        source: Source

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            this = args[0] if args else None
            if type(this) is cls:
                source = this.source
                if func in harmless and not source.opened:
                    with torch._C.DisableTorchFunctionSubclass():
                        return func(*args, **kwargs)
                if func in moves and not source.opened:
                    device = destination(func is moves[1], this, args[1:], kwargs)
                    found = None if device is None else source.there(device)
                    if found is not None:
                        return found
            return func(*_plain(args), **_plain(kwargs))

        @classmethod
        def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            # Called from C++, where the function above is not asked.
            return func(*_plain(args), **_plain(kwargs or {}))

        def __hash__(self) -> int:
            return id(self)

        def __reduce_ex__(self, protocol: Any) -> Any:
            host: Any = self.source.host()
            return host.__reduce_ex__(protocol)

        def __deepcopy__(self, memo: Any) -> Any:
            return copy.deepcopy(self.source.host(), memo)

    def _plain(values: Any) -> Any:
        if isinstance(values, Twin):
            return values.source.host()
        if isinstance(values, (tuple, list, dict)):
            return replaced(values, _plain, Twin)
        return values

    return Twin


def twin(source: Source, like: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A twin with the dtype of `like` (on the CPU): of its shape and strides, or contiguous of another `shape`."""
    import torch

    make: Any = torch.Tensor._make_wrapper_subclass
    size, strides = (like.shape, like.stride()) if shape is None else (shape, None)
    made = make(_twin(), size, strides, dtype=like.dtype, device="cpu")
    made.source = source
    return made  # type: ignore[no-any-return]


def destination(cuda: bool, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where `tensor.to(...)`, or `tensor.cuda(...)`, moves it; None if that changes more than the device."""
    import torch

    if cuda:
        if kwargs.get("memory_format") not in (None, torch.preserve_format):
            return None
        found: Any = args[0] if args else kwargs.get("device")
        device = torch.device("cuda") if found is None else torch.device("cuda", found) if type(found) is int else found
        device = torch.device(device)
    else:
        try:
            device, dtype, _, order = torch._C._nn._parse_to(*args, **kwargs)
        except (TypeError, RuntimeError):
            return None  # the stock call says what is wrong
        if device is None or dtype not in (None, tensor.dtype) or order not in (None, torch.preserve_format):
            return None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device  # type: ignore[no-any-return]


def movable(tensor: Any) -> bool:
    """Whether a batch's tensor is a plain one on the CPU, of which a twin can be made."""
    import torch

    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return False
    if tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or not tensor.numel():
        return False
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last or tensor.is_contiguous()


def replaced(data: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """`data` with `change` applied to every `kind` in it, in the containers PyTorch's `pin_memory` looks into."""
    if isinstance(data, kind):
        return change(data)
    if isinstance(data, MutableMapping):
        try:
            clone = copy.copy(data)
            clone.update({key: replaced(item, change, kind) for key, item in data.items()})
        except TypeError:  # a mapping that cannot be copied stays as it is
            return data
        return clone
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(replaced(item, change, kind) for item in data))
    if type(data) is tuple or type(data) is list:
        return type(data)(replaced(item, change, kind) for item in data)
    return data
