"""States of torchao's 8-bit, 4-bit and float8 optimizers as plain tensors, so that a checkpoint can hold them.

torchao keeps a moment as a tensor subclass: codes, a scale per block, and the table of values that the codes stand for.
A checkpoint stores plain tensors only. With `store_plainly` the optimizer's own `state_dict()` gives the parts, and its
`load_state_dict()` puts them together again: the same bits, from a closed list of kinds.
The learning rate, a tensor in torchao's optimizers, is stored as the number it is.
Limits: moments of fewer than 4,096 values stay in full precision (torchao's rule). Several ranks train with DDP only,
where each of them holds all moments: of a moment that is sharded as well, codes and scales would have to be cut at the
same blocks, so FSDP2 is declined.

Sources: Dettmers et al. 2022 (arXiv:2110.02861), 8 bits; Li et al. 2023 (arXiv:2309.01507), 4 bits; `torchao.optim`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upshift._optional import require
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Kind of state -> where torchao has it.
_KINDS = {
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
_KIND, _TENSORS, _REST = "low_bit", "tensors", "rest"


def store_plainly(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let the optimizer's state dict hold plain tensors and numbers; returns the optimizer.

    Raises:
        UsageError: its parameters are sharded (FSDP2).
    """
    # Asked of the tensor, since importing what DTensor is takes seconds.
    if any(hasattr(item, "placements") for group in optimizer.param_groups for item in group["params"]):
        raise UsageError(
            f"{type(optimizer).__name__} keeps states of few bits, which are not sharded here.",
            remedy="Train with ddp, where every rank holds all states, or with another optimizer.",
        )
    optimizer.register_state_dict_post_hook(lambda _, state: _with(state, _taken_apart, _number))
    optimizer.register_load_state_dict_pre_hook(lambda found, state: _loaded(found, state))
    return optimizer


def _loaded(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict as torchao wants it: states put together, and a rate in a tensor where it keeps one there."""
    import torch

    own: Any = next((group["lr"] for group in optimizer.param_groups), None)

    def rate(value: Any) -> Any:
        return torch.tensor(value, dtype=own.dtype, device=own.device) if isinstance(own, torch.Tensor) else value

    return _with(state, _put_together, lambda value: rate(_number(value)))


def _with(state: dict[str, Any], change: Any, rate: Any) -> dict[str, Any]:
    """The state dict with each value of each state, and each `lr`, changed; its dicts are the optimizer's own, so these
    are new."""
    changed = {at: {key: change(item) for key, item in entry.items()} for at, entry in state["state"].items()}
    groups = [{**group, "lr": rate(group["lr"])} if "lr" in group else group for group in state["param_groups"]]
    return {**state, "state": changed, "param_groups": groups}


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _taken_apart(value: Any) -> Any:
    if type(value).__name__ not in _KINDS or not hasattr(value, "__tensor_flatten__"):
        return value
    names, rest = value.__tensor_flatten__()
    return {
        _KIND: type(value).__name__,
        _TENSORS: {name: getattr(value, name) for name in names},
        _REST: [_plain(item) for item in rest],
    }


def _put_together(value: Any) -> Any:
    if not isinstance(value, dict) or _KIND not in value:
        return value
    kind = value[_KIND]
    if kind not in _KINDS:
        raise UsageError(f"A state of the optimizer is a {kind!r}.", remedy="Resume with the optimizer that saved it.")
    found = getattr(require(_KINDS[kind], extra="lowbit", why="This optimizer's state"), kind)
    return found.__tensor_unflatten__(dict(value[_TENSORS]), [_torchs(item) for item in value[_REST]])


def _plain(item: Any) -> Any:
    """A flag, a shape or a dtype as JSON has it."""
    import torch

    if isinstance(item, torch.dtype):
        return str(item).removeprefix("torch.")
    return list(item) if isinstance(item, tuple) else item


def _torchs(item: Any) -> Any:
    import torch

    if isinstance(item, str):
        return {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}[item]
    return torch.Size(item) if isinstance(item, list) else item
