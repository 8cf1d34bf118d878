"""States of model and optimizer under the plain model's names, alike for one process, DDP and FSDP2.

What four ranks wrote loads in two or in one, and into a script that knows nothing of upshift: keys are those of the
model that the person built, parameters are whole tensors, and rank 0 holds all. With FSDP2 tensors are gathered and
sharded one at a time, so that no rank needs room for a second model.

`torch.distributed.checkpoint.state_dict` does much the same, with three differences that matter here: it gives ranks
their values through pickle, it makes a step with an optimizer that has no state yet (Adam's step count is then one
ahead), and a key that is missing on rank 0 leaves the other ranks waiting.

    model state       name -> tensor, as `state_dict()` of the plain model
    optimizer state   {"state": {name: {"exp_avg": tensor, ...}}, "param_groups": [{"lr": ..., "params": [names]}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from upshift.engine.wrapping import unwrapped
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

    from upshift.engine.group import Group

_COMPILED = "_orig_mod."


def model_state(group: Group, model: torch.nn.Module) -> dict[str, Any]:
    """The model's state on rank 0, nothing on the others; all ranks call it.

    Tensors are the live ones (copy before the next step), or on the CPU where they had to be gathered.
    """
    return _gathered(group, {_plain(key): value for key, value in unwrapped(model).state_dict().items()})


def load_model_state(group: Group, model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `model_state` returned, of any number of ranks; all ranks call it, `state` counts on rank 0.

    Raises:
        UsageError: keys or shapes are not those of the model; on every rank.
    """
    module = unwrapped(model)
    own = {_plain(key): (key, value) for key, value in module.state_dict().items()}
    names = group.broadcast({key: _shape(value) for key, value in state.items()}) if group.world > 1 else {
        key: _shape(value) for key, value in state.items()}  # fmt: skip
    _same_keys(names, {key: _shape(value) for key, (_, value) in own.items()})
    filled = {own[name][0]: _like(value, own[name][1]) for name, value in _streamed(group, state)}
    module.load_state_dict(filled)


def optimizer_state(group: Group, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name on rank 0, nothing on the others; all ranks call it."""
    found = optimizer.state_dict()
    names = _names(model, optimizer)
    flat = {(names[i], key): value for i, entries in found["state"].items() for key, value in entries.items()}
    flat = _gathered(group, flat)
    if not group.main:
        return {}
    state: dict[str, dict[str, Any]] = {names[i]: {} for i in found["state"]}
    for (name, key), value in flat.items():
        state[name][key] = value
    groups = [{**options, "params": [names[i] for i in options["params"]]} for options in found["param_groups"]]
    return {"state": state, "param_groups": groups}


def load_optimizer_state(
    group: Group, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state` returned, of any number of ranks; all ranks call it, `state` counts on rank 0.

    Tensors are taken over, not copied, where they have the device of their parameter already.

    Raises:
        UsageError: it belongs to other parameters or other parameter groups; on every rank.
    """
    names = _names(model, optimizer)
    if group.world > 1:
        # A checkpoint is whole on rank 0 only; options travel as JSON, which turns tuples into lists.
        groups = group.broadcast(state.get("param_groups"))
        entries = group.broadcast(list(state["state"]) if group.main else None)
    else:
        groups, entries = state["param_groups"], list(state["state"])
    own = optimizer.state_dict()["param_groups"]
    _same_groups(groups, [[names[i] for i in options["params"]] for options in own])
    numbers = {name: i for i, name in names.items()}
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    loaded: dict[int, dict[str, Any]] = {numbers[name]: {} for name in entries}
    flat = {(name, key): value for name, items in state.get("state", {}).items() for key, value in items.items()}
    for (name, key), value in _streamed(group, flat):
        loaded[numbers[name]][key] = _like(value, parameters[numbers[name]])
    options = [
        {key: tuple(value) if isinstance(mine.get(key), tuple) else value for key, value in saved.items()}
        | {"params": mine["params"]}
        for saved, mine in zip(groups, own, strict=True)
    ]
    optimizer.load_state_dict({"state": loaded, "param_groups": options})


# -- gathering and spreading -------------------------------------------------------------------------------------------


def _gathered(group: Group, values: dict[Any, Any]) -> dict[Any, Any]:
    """Whole tensors on rank 0; every rank takes part for those that are sharded, in the same order."""
    from torch.distributed.tensor import DTensor

    found: dict[Any, Any] = {}
    for key, value in values.items():
        whole = value
        if isinstance(value, DTensor):
            whole = value.full_tensor()
            whole = whole.cpu() if group.main else None
        if group.main:
            found[key] = whole
    return found


def _streamed(group: Group, values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Rank 0's values on every rank, one after the other; on other ranks `values` is not looked at."""
    import torch
    import torch.distributed as dist

    if group.world == 1:
        yield from values.items()
        return
    plan = None
    if group.main:
        plan = [
            [key, {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}, None]
            if isinstance(value, torch.Tensor)
            else [key, None, value]
            for key, value in values.items()
        ]
    for key, kind, value in group.broadcast(plan):
        name = tuple(key) if isinstance(key, list) else key
        if kind is None:
            yield name, value
            continue
        if group.main:
            whole = values[name].detach().cpu().contiguous()
        else:
            whole = torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]))
        dist.broadcast(whole, src=0)
        yield name, whole


def _like(value: Any, own: Any) -> Any:
    """`value` sharded as `own` is, where `own` is a shard and `value` has its shape (a step count has not)."""
    import torch
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(own, DTensor) or not isinstance(value, torch.Tensor) or value.shape != own.shape:
        return value
    # Every rank has the whole tensor: it keeps its part, and nothing travels.
    part = value.to(own.device)
    mesh = own.device_mesh
    for dimension, placement in enumerate(own.placements):
        if isinstance(placement, Shard):
            pieces = part.chunk(mesh.size(dimension), dim=placement.dim)
            place = mesh.get_local_rank(dimension)
            part = pieces[place] if place < len(pieces) else part.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        part.contiguous(), mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


# -- names and checks --------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Number in the optimizer's state -> name in the plain model; `#3` for a parameter that is not the model's."""
    known = {id(p): _plain(name) for name, p in unwrapped(model).named_parameters()}
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    return {i: known.get(id(p), f"#{i}") for i, p in enumerate(parameters)}


def _shape(value: Any) -> list[int] | None:
    return list(value.shape) if hasattr(value, "shape") else None


def _same_keys(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    missing = [name for name in own if name not in saved]
    extra = [name for name in saved if name not in own]
    other = [f"{name} is {saved[name]}, should be {own[name]}" for name in own
             if name in saved and saved[name] != own[name]]  # fmt: skip
    problems = [
        *([f"missing: {_some(missing)}"] if missing else []),
        *([f"not in the model: {_some(extra)}"] if extra else []),
        *([f"shapes: {_some(other)}"] if other else []),
    ]
    if problems:
        raise UsageError(
            f"the state is that of another model ({'; '.join(problems)}).",
            remedy="Build the model as it was when the state was saved.",
        )


def _same_groups(saved: Any, own: list[list[str]]) -> None:
    found = [options["params"] for options in saved or []]
    if found != own:
        raise UsageError(
            f"the optimizer's state is that of other parameters: {[len(names) for names in found]} in groups then, "
            f"{[len(names) for names in own]} now, or in another order.",
            remedy="Make parameter groups as they were when the state was saved, or load only the weights.",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
