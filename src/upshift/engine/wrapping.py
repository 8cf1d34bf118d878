"""A model on several ranks, by torch itself: DistributedDataParallel, or FSDP2 (`fully_shard`).

FSDP2 shards block by block: a block's weights are gathered when it is needed and freed afterwards. Blocks are the
members of a ModuleList or Sequential that repeat a class and are not single layers (transformer blocks, residual
stages); where there are none, or weights are shared between a block and the rest, the model is one unit.

Sources: Li et al. (2020), VLDB 13(12); Zhao et al. (2023), "PyTorch FSDP", VLDB 16(12); torch's documentation of
`torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import TYPE_CHECKING, Any

from upshift.engine.gradients import broadcast_tensors
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch


def ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DistributedDataParallel with rank 0's weights; the model itself where nothing is trained.

    Buffers are not broadcast in the forward pass, which must be free of collectives: `Group.reduce_gradients` does it.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not any(p.requires_grad for p in model.parameters()):
        return model
    # Renamed in torch 2.13.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    if device.type == "cuda":
        options["device_ids"] = [device.index]
    return DistributedDataParallel(model, **options)


def fsdp2(model: torch.nn.Module, device: torch.device, world: int) -> torch.nn.Module:
    """The model with rank 0's weights, sharded in place over all ranks.

    Raises:
        UsageError: parameters without values (meta device).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise UsageError(
            "the model has parameters on the meta device, which hold no values.",
            remedy="Build the model on the CPU or on the device that it is trained on.",
        )
    broadcast_tensors(tensors)
    mesh = init_device_mesh(device.type, (world,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a model, outermost first; none where a weight is shared across a block's border."""
    import torch

    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            continue
        composed = [m for m in module.children() if next(m.children(), None) is not None and _trained(m)]
        repeated = Counter(type(m) for m in composed)
        for member in composed:
            if repeated[type(member)] > 1:
                found.append(member)
                inside.update(id(m) for m in member.modules())
    owners: Counter[int] = Counter()
    for block in found:
        owners.update({id(p) for p in block.parameters()})
    rest = {id(p) for name, module in model.named_modules() if id(module) not in inside
            for p in module.parameters(recurse=False)}  # fmt: skip
    shared = any(count > 1 for count in owners.values()) or any(key in rest for key in owners)
    return [] if shared else found


def _trained(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The person's own module below DistributedDataParallel and torch.compile."""
    from torch.nn.parallel import DistributedDataParallel

    found: Any = module
    while True:
        if isinstance(found, DistributedDataParallel):
            found = found.module
        elif hasattr(found, "_orig_mod"):
            found = found._orig_mod
        else:
            result: torch.nn.Module = found
            return result
