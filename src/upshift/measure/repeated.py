"""Which submodules of a model repeat, so that code made for one serves the others.

A block is a member of a `ModuleList`, `Sequential` or `ModuleDict`; blocks repeat where two or more members of one such
container have one class and parameters of the same names, shapes and dtypes. Only the outermost blocks count: what
repeats inside a block does so in every one of them. A single layer of `torch.nn` is no block: there is nothing in it to
join. Equal blocks may still run differently (a layer index, a stochastic depth); nothing is called to find out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def repeated_blocks(module: torch.nn.Module) -> tuple[tuple[torch.nn.Module, ...], ...]:
    """Groups of equal blocks below `module`, each of at least two, in the order in which they are found.

    Equal blocks of several containers make one group. Nothing is called or changed.
    """
    groups: dict[Any, dict[int, torch.nn.Module]] = {}
    seen: set[int] = set()

    def visit(parent: torch.nn.Module) -> None:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        alike = _alike(parent) if _is_container(parent) else {}
        blocks = {id(block) for members in alike.values() for block in members}
        for key, members in alike.items():
            groups.setdefault(key, {}).update((id(block), block) for block in members)
        for child in parent.children():
            if id(child) not in blocks:
                visit(child)

    visit(module)
    return tuple(tuple(group.values()) for group in groups.values())


def repeated_share(module: torch.nn.Module, groups: tuple[tuple[torch.nn.Module, ...], ...]) -> float:
    """Share of the model's leaf layers that lie in these blocks (0..1); each layer counts once."""
    layers = _leaves(module)
    inside = {key for group in groups for block in group for key in _leaves(block)}
    return len(inside & layers) / len(layers)


def _alike(parent: torch.nn.Module) -> dict[Any, list[torch.nn.Module]]:
    """Children of a container by class and parameters, where there are two or more of a kind."""
    kinds: dict[Any, list[torch.nn.Module]] = {}
    for child in parent.children():
        key = _kind(child)
        if key is not None:
            kinds.setdefault(key, []).append(child)
    return {key: members for key, members in kinds.items() if len(members) > 1}


def _is_container(module: torch.nn.Module) -> bool:
    from torch import nn

    return isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))


def _kind(module: torch.nn.Module) -> Any:
    """What equal blocks have in common; None where this is no block."""
    from torch import nn

    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # which are never called
        return None
    if next(module.children(), None) is None and type(module).__module__.startswith("torch.nn."):
        return None
    parameters = list(module.named_parameters())
    if not parameters or any(nn.parameter.is_lazy(item) for _, item in parameters):
        return None
    return type(module), tuple(
        (name, tuple(item.shape), item.dtype, item.device, item.requires_grad) for name, item in parameters
    )


def _leaves(module: torch.nn.Module) -> set[int]:
    return {id(item) for item in module.modules() if next(item.children(), None) is None}
