"""One batch once more, between two steps of a real run: without a technique and with it, from the same everything.

`Recorder` keeps the calls of root modules of one step and the gradient of the loss with respect to what they returned.
`replay` runs them again: the model forward and backward, and the optimizer's step on the gradients that the script has
left. Parameters, buffers, plain attributes of modules, optimizer state, gradients and random states are put back, so
that the run goes on as if nothing had happened. What is not put back is what a forward call does outside of its
modules: a counter in a global variable, a line in a file.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.hook.dropout import dropout_off
from upshift.hook.snapshots import sampled
from upshift.measure.inrun import Replayed
from upshift.sites import Card, ModelSeen, Moment, Numerics
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    from upshift.hook.watch import Watch
    from upshift.sites import Stage

#: Calls of root modules that are kept of a step; micro-batches after them are not replayed.
MOST_CALLS = 4


class CannotReplay(Exception):
    """Why this step shows nothing."""


class Call:
    """One call of a root module that gradients went back through."""

    def __init__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch
        from torch.utils._pytree import tree_map

        self.module = module
        # Without the graph that made them, but still wanting a gradient.
        self.args, self.kwargs = tree_map(
            lambda item: item.detach().requires_grad_() if _wants_gradient(item) else item, (args, kwargs)
        )
        device = next((item.device.type for item in module.parameters()), "cpu")
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.random = random_state()
        self.back: list[Any] = []

    def returned(self, output: Any) -> bool:
        """Ask for the gradient of the loss with respect to what the call returned; False where it has none."""
        tensors = _differentiable(output)
        self.back = [None] * len(tensors)
        for index, tensor in enumerate(tensors):
            tensor.register_hook(functools.partial(self._keep, index))
        return bool(tensors)

    def _keep(self, index: int, gradient: Any) -> None:
        kept = self.back[index]
        self.back[index] = gradient.detach() if kept is None else kept + gradient.detach()


class Recorder(BaseApplied):
    """Changes nothing; keeps the calls of one step. On a stage it is a technique like any other."""

    card: ClassVar[Card] = Card(
        name="(recorder)", summary="", source="", sites=("model_created",), numerics=Numerics.BITWISE,
        switchable="live", targets=(),
    )  # fmt: skip

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def at(self, moment: Moment, settings: Any) -> Recorder | None:
        """Around every root module."""
        return self if isinstance(moment, ModelSeen) else None

    def numerics(self, settings: Any, facts: Any) -> Numerics:
        """Nothing changes."""
        return Numerics.BITWISE

    def check(self, seen: Any) -> Any:
        """Never tried."""
        raise NotImplementedError

    def switch(self, on: bool) -> None:
        """Off, it is not called."""

    def around(self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call, and keep the call."""
        import torch

        if not torch.is_grad_enabled() or len(self.calls) >= MOST_CALLS:
            return call(*args, **kwargs)
        kept = _kept(module, args, kwargs)
        output = call(*args, **kwargs)
        if kept is not None and kept.returned(output):
            self.calls.append(kept)
        return output


def _kept(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call, if it can be kept; an argument that cannot be detached must not end the script's own call."""
    try:
        return Call(module, args, kwargs)
    except Exception:
        return None


def replay(
    watch: Watch, calls: Sequence[Call], reference: tuple[str, ...], candidate: tuple[str, ...], *, dropout: bool = True
) -> tuple[Replayed, Replayed]:
    """The calls replayed with each of two sets of live techniques; `reference` is on before and afterwards.

    Args:
        dropout: whether dropout acts; its mask may depend on the layout of memory.

    Raises:
        CannotReplay: nothing can be compared.
    """
    calls = [call for call in calls if any(item is not None for item in call.back)]
    if not calls:
        raise CannotReplay("no gradient went back through a call of the model")
    optimizers = [found for item in watch.optimizers if (found := item()) is not None]
    if any(id(item) in watch.closures for item in optimizers):
        raise CannotReplay("the optimizer's step takes a closure")
    _check_memory(optimizers)
    found = []
    stage = watch.stage
    with _unseen(watch), _put_back([call.module for call in calls]), nullcontext() if dropout else _without_dropout():
        try:
            for names in (reference, candidate):
                stage.switch(names)
                found.append(Replayed(*_backward(stage, calls), *_step(watch, optimizers)))
        finally:
            stage.switch(reference)
    return found[0], found[1]


def parameter_names(watch: Watch) -> dict[int, str]:
    """id -> name of the parameters of all models; a name that two models share is not one."""
    found = [(id(item), name) for model in watch.models if (module := model()) is not None
             for name, item in module.named_parameters()]  # fmt: skip
    counts = Counter(name for _, name in dict(found).items())
    return {key: name for key, name in found if counts[name] == 1}


def _backward(stage: Stage, calls: Sequence[Call]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model returns, and the gradients of its parameters and of its inputs."""
    import torch
    from torch.utils._pytree import tree_leaves

    outputs, gradients = {}, {}
    for number, call in enumerate(calls):
        suffix = f", call {number + 1}" if number else ""
        run: Callable[..., Any] = call.module
        for _, applied in reversed(stage.forward_for(call.module)):
            run = functools.partial(_around, applied, run, call.module)
        set_random_state(call.random)
        device, dtype, enabled = call.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            returned = _differentiable(run(*call.args, **call.kwargs))
        if len(returned) != len(call.back):
            raise CannotReplay("the model does not return the same twice")
        pairs = [(tensor, back) for tensor, back in zip(returned, call.back, strict=True) if back is not None]
        if any(tensor.shape != back.shape for tensor, back in pairs):
            raise CannotReplay("the model does not return the same twice")
        named = {name: item for name, item in call.module.named_parameters() if item.requires_grad}
        inputs = [item for item in tree_leaves((call.args, call.kwargs)) if _wants_gradient(item)]
        named.update({f"input {index + 1}": item for index, item in enumerate(inputs)})
        found = torch.autograd.grad(
            [tensor for tensor, _ in pairs],
            list(named.values()),
            [back.to(tensor.dtype) for tensor, back in pairs],
            allow_unused=True,
        )
        for index, (tensor, _) in enumerate(pairs):
            outputs[f"output {index + 1}{suffix}"] = sampled(tensor)
        for (name, owner), gradient in zip(named.items(), found, strict=True):
            # None in one arm and not in the other must not look like an absence in both.
            gradients[name + suffix] = sampled(torch.zeros_like(owner) if gradient is None else gradient)
    return outputs, gradients


def _around(applied: Any, call: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    return applied.around(call, module, args, kwargs)


def _step(watch: Watch, optimizers: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The optimizer's step on the gradients as they are, undone: the gradients it got, what it did of them, and the
    difference that two roundings of a parameter make."""
    import torch

    stepped: dict[str, Any] = {}
    updates: dict[str, Any] = {}
    rounding: dict[str, Any] = {}
    names = parameter_names(watch)
    for number, optimizer in enumerate(optimizers):
        named = {
            names.get(id(parameter), f"parameter {number + 1}.{g}.{p}"): parameter
            for g, group in enumerate(optimizer.param_groups)
            for p, parameter in enumerate(group["params"])
            if parameter.grad is not None
        }
        if not named:
            raise CannotReplay("the script leaves no gradients after the step")
        before = {name: sampled(parameter) for name, parameter in named.items()}
        with _undone(optimizer), torch.no_grad():
            for _, applied in watch.stage.steps_for(optimizer):
                applied.before_step(optimizer)
            for name, parameter in named.items():
                gradient = parameter.grad
                stepped[name] = sampled(torch.zeros_like(parameter) if gradient is None else gradient)
            # Without torch's wrapper around it, so that no hook of the script hears of a step.
            inspect.unwrap(type(optimizer).step)(optimizer)
            for name, parameter in named.items():
                updates[name] = sampled(parameter) - before[name]
                rounding[name] = 2.0 * torch.finfo(parameter.dtype).eps * abs(before[name])
    return stepped, updates, rounding


# -- putting things back -------------------------------------------------------------------------------------------


@contextmanager
def _unseen(watch: Watch) -> Iterator[None]:
    """The books take no note of what goes on."""
    watch._busy = watch._in_backward = True
    try:
        yield
    finally:
        watch._busy = watch._in_backward = False


@contextmanager
def _without_dropout() -> Iterator[None]:
    import torch

    on_again = dropout_off(torch)
    try:
        yield
    finally:
        on_again()


@contextmanager
def _put_back(modules: Sequence[Any]) -> Iterator[None]:
    """Buffers, plain attributes of modules and random states are afterwards what they were."""
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    buffers = [(buffer, buffer.detach().clone()) for part in parts for buffer in part.buffers(recurse=False)]
    attributes = [(vars(part), dict(vars(part))) for part in parts]
    # Plain dicts are what modules keep their buffers and hooks in.
    held = [(value, value.copy()) for _, names in attributes for value in names.values() if type(value) in (dict, list)]
    state = random_state()
    try:
        yield
    finally:
        for names, before in (*attributes, *((value, copy) for value, copy in held if type(value) is dict)):
            for key in set(names) - set(before):
                del names[key]
            names.update(before)
        for value, copy in held:
            if type(value) is list:
                value[:] = copy
        for buffer, before in buffers:
            buffer.data.copy_(before)
        set_random_state(state)


@contextmanager
def _undone(optimizer: Any) -> Iterator[None]:
    """Parameters, gradients, state and settings of an optimizer are afterwards what they were.

    Values are written into the tensors there are (`.data` counts no version: no graph can be upset).
    """
    import torch

    def kept(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    parameters = [item for group in optimizer.param_groups for item in group["params"] if item.grad is not None]
    values = [(item, kept(item), item.grad, kept(item.grad)) for item in parameters]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    states = {
        key: (state, {name: kept(value) for name, value in state.items()}) for key, state in optimizer.state.items()
    }
    try:
        yield
    finally:
        for item, value, gradient, content in values:
            item.data.copy_(value)
            item.grad = gradient
            gradient.data.copy_(content)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for key in set(group) - set(before) - {"params"}:
                del group[key]
            group.update(before)
        for key in set(optimizer.state) - set(states):
            del optimizer.state[key]
        for key, (state, before) in states.items():
            for name in set(state) - set(before):
                del state[name]
            for name, value in before.items():
                now = state.get(name)
                if isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor) and now.shape == value.shape:
                    now.data.copy_(value)
                else:
                    state[name] = value
            optimizer.state[key] = state


def random_state() -> tuple[Any, ...]:
    """The state of every usual source of random numbers in this process."""
    import torch

    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if in_use else None
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    return torch.get_rng_state(), devices, random.getstate(), drawn


def set_random_state(state: tuple[Any, ...]) -> None:
    """Go back to a state taken with `random_state`."""
    import torch

    own, devices, plain, drawn = state
    torch.set_rng_state(own)
    if devices is not None:
        torch.cuda.set_rng_state_all(devices)
    random.setstate(plain)
    if drawn is not None:
        sys.modules["numpy"].random.set_state(drawn)


def _check_memory(optimizers: Sequence[Any]) -> None:
    """Refuse where the copies might not fit: running out of memory would end the run."""
    import psutil
    import torch

    from upshift.hardware.machine import memory_limit

    tensors = []
    for optimizer in optimizers:
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        tensors += [*parameters, *(item.grad for item in parameters if item.grad is not None)]
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    needed = sum(item.nbytes for item in tensors)
    if any(item.device.type == "cuda" for item in tensors):
        free = torch.cuda.mem_get_info()[0]
    else:
        free = min(psutil.virtual_memory().available, max(memory_limit() - psutil.Process().memory_info().rss, 0))
    if 2 * needed > free:
        raise CannotReplay(f"{2 * needed / 2**20:,.0f} MiB are wanted for copies, {free / 2**20:,.0f} are free")


def _wants_gradient(item: Any) -> bool:
    import torch

    return isinstance(item, torch.Tensor) and item.requires_grad


def _differentiable(output: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return [item for item in tree_leaves(output) if _wants_gradient(item)]
