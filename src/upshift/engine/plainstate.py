"""States of model and optimizer under the plain model's names, alike for one process, DDP and FSDP2.

What four ranks wrote loads in two or in one, and into a script that knows nothing of upshift: keys are those of the
model that the person built. With FSDP2 tensors are the shards of this rank (DTensor); what is loaded may be whole, or
the blocks of other ranks in the files of a checkpoint, of which each rank takes its own. Nothing travels between ranks.

`torch.distributed.checkpoint.state_dict` does much the same, with three differences that matter here: it gives ranks
their values through pickle, it makes a step with an optimizer that has no state yet (Adam's step count is then one
ahead), and a key that is missing on rank 0 leaves the other ranks waiting.

    model state       name -> tensor, as `state_dict()` of the plain model
    optimizer state   {"state": {name: {"exp_avg": tensor, ...}}, "param_groups": [{"lr": ..., "params": [names]}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from upshift.engine.sharding import like, whole
from upshift.engine.wrapping import unwrapped
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

_COMPILED = "_orig_mod."


def model_state(model: torch.nn.Module) -> dict[str, Any]:
    """The model's state as this rank holds it: live tensors (copy before the next step), shards as DTensor."""
    return {_plain(key): value for key, value in unwrapped(model).state_dict().items()}


def load_model_state(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `model_state` returned, on any number of ranks.

    Args:
        state: alike on all ranks; its tensors may be whole, or come from a checkpoint (`sharding.like`).

    Raises:
        UsageError: keys or shapes are not those of the model; alike on all ranks.
    """
    module = unwrapped(model)
    own = {_plain(key): (key, value) for key, value in module.state_dict().items()}
    shapes = {key: _shape(value) for key, (_, value) in own.items()}
    _same_keys({key: _shape(value) for key, value in state.items()}, shapes)
    module.load_state_dict({own[name][0]: like(value, own[name][1]) for name, value in state.items()})


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, as this rank holds it."""
    found = optimizer.state_dict()
    names = _names(model, optimizer)
    state = {names[i]: dict(entries) for i, entries in found["state"].items()}
    groups = [{**options, "params": [names[i] for i in options["params"]]} for options in found["param_groups"]]
    return {"state": state, "param_groups": groups}


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` returned, on any number of ranks; `state` as for `load_model_state`.

    Tensors are taken over, not copied, where they have the device of their parameter already.

    Raises:
        UsageError: it belongs to other parameters or other parameter groups; alike on all ranks.
    """
    names = _names(model, optimizer)
    own = optimizer.state_dict()["param_groups"]
    groups = whole(state.get("param_groups"))
    _same_groups(groups, [[names[i] for i in options["params"]] for options in own])
    numbers = {name: i for i, name in names.items()}
    _same_keys(dict.fromkeys(state["state"]), dict.fromkeys(name for name in names.values() if name in state["state"]))
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    loaded: dict[int, dict[str, Any]] = {}
    for name, entries in state["state"].items():
        parameter = parameters[numbers[name]]
        loaded[numbers[name]] = {key: like(value, parameter) for key, value in entries.items()}
    options = [
        {key: tuple(value) if isinstance(mine.get(key), tuple) else value for key, value in saved.items()}
        | {"params": mine["params"]}
        for saved, mine in zip(groups, own, strict=True)
    ]
    optimizer.load_state_dict({"state": loaded, "param_groups": options})


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
