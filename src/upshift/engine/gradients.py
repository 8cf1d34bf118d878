"""Averaging gradients over ranks in flat buckets, and clipping them.

Many small tensors are copied into few large ones ("buckets"), because every all-reduce has a fixed cost. Buckets hold
one dtype and device each and at most `BUCKET` bytes, as in Li et al. (2020), VLDB 13(12), section 3.2.2.

Gradients are divided by the number of ranks before they are summed: in half precision a sum may overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Bytes of one bucket: DDP's default.
BUCKET = 25 * 2**20


def own_parameters(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Those whose gradients nobody else averages: all that require one, but for the shards of FSDP2."""
    from torch.distributed.tensor import DTensor

    return [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]


class Buckets:
    """The flat buckets of a list of parameters; made once, used every step."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], world: int) -> None:
        """
        Args:
            parameters: the same ones in the same order on every rank.
            world: number of ranks.
        """
        self.parameters = list(parameters)
        self.missing = False
        """Whether some parameter had no gradient on this rank in any step so far."""
        self._world = world
        self._buckets = [_Bucket(group) for group in _grouped(self.parameters)]

    def fits(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these are the buckets of those parameters."""
        return len(parameters) == len(self.parameters) and all(
            a is b for a, b in zip(parameters, self.parameters, strict=True)
        )

    def average(self) -> None:
        """Average `.grad` over the ranks. A gradient that some ranks lack counts as zero there.

        Raises:
            UsageError: a gradient is sparse.
        """
        import torch.distributed as dist

        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.layout is not _strided():
                raise UsageError(
                    "a gradient is sparse, and sparse gradients are not averaged over ranks.",
                    remedy="Make the Embedding with sparse=False, or train in one process.",
                )
        working = []
        for bucket in self._buckets:
            bucket.fill(self._world)
            working.append(dist.all_reduce(bucket.flat, async_op=True))
        for bucket, work in zip(self._buckets, working, strict=True):
            work.wait()
            self.missing |= bucket.empty()


class _Bucket:
    """One flat tensor: the gradients, then one number a parameter that is above zero where some rank has a gradient."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        import torch

        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        first = parameters[0]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=first.dtype, device=first.device)
        *parts, self.present = self.flat.split_with_sizes([*sizes, len(sizes)])
        self.views = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def fill(self, world: int) -> None:
        import torch

        self.present.fill_(1.0)
        into: list[Any] = []
        out_of: list[Any] = []
        for place, (view, parameter) in enumerate(zip(self.views, self.parameters, strict=True)):
            if parameter.grad is None:
                view.zero_()
                self.present[place] = 0.0
            else:
                into.append(view)
                out_of.append(parameter.grad)
        if into:
            torch._foreach_copy_(into, out_of)
        self.flat.div_(world)

    def empty(self) -> bool:
        """Copy the averages back; whether a gradient was missing here."""
        import torch

        held = [(p.grad, view) for p, view in zip(self.parameters, self.views, strict=True) if p.grad is not None]
        if held:
            torch._foreach_copy_([grad for grad, _ in held], [view for _, view in held])
        if len(held) == len(self.parameters):
            return False
        # Only a rank that lacks a gradient has to know whether others have it: reading waits for the device.
        for parameter, view, present in zip(self.parameters, self.views, self.present.tolist(), strict=True):
            if parameter.grad is None and present > 0.0:
                parameter.grad = view.clone()
        return True


def _grouped(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """By dtype and device, in order, at most `BUCKET` bytes each."""
    groups: list[list[torch.nn.Parameter]] = []
    current: dict[Any, tuple[list[torch.nn.Parameter], int]] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        group, held = current.get(kind, ([], 0))
        if not group or held + size > BUCKET:
            group, held = [], 0
            groups.append(group)
        group.append(parameter)
        current[kind] = (group, held + size)
    return groups


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Give every rank the values of rank `src`, in place; one collective for all tensors of a dtype and device."""
    import torch
    import torch.distributed as dist

    kinds: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for group in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=src)
        parts = flat.split_with_sizes([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients in place to an L2 norm of at most `max_norm` over all of them; returns the norm before.

    Shards of FSDP2 count once each, so that the norm is that of the whole gradient.

    Source: Pascanu et al. (2013), "On the difficulty of training recurrent neural networks", algorithm 1.
    """
    import torch
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _strided() -> Any:
    import torch

    return torch.strided
