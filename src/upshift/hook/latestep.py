"""One late step of two processes from one and the same state: what does a technique do once training is under way?

The first updates are compared from the same start. Later the arms have parted by rounding, and a fault that begins
late shows only in the losses, slowly. So at the end of a confirmation the reference writes its state, the candidate
takes it over, and both make their next step on the same batch, without dropout: losses, gradients and updates must
agree again as they did at the first step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.hook.snapshots import sampled

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Larger states (bytes) are not copied.
MOST = 2 << 30


def _parameters(watch: Watch) -> Iterator[tuple[str, Any, Any]]:
    """Name, parameter and its optimizer; the names are alike in both processes."""
    for o, reference in enumerate(watch.optimizers):
        optimizer = reference()
        if optimizer is not None:
            for g, group in enumerate(optimizer.param_groups):
                for p, parameter in enumerate(group["params"]):
                    yield f"optimizer{o}.group{g}.{p}", parameter, optimizer


def _tensors(watch: Watch) -> Iterator[tuple[str, Any]]:
    """Parameters, optimizer state and buffers."""
    for name, parameter, optimizer in _parameters(watch):
        yield name, parameter
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if hasattr(value, "copy_"):
                yield f"{name}.{key}", value
    for m, reference in enumerate(watch.models):
        module = reference()
        for name, value in module.named_buffers() if module is not None else ():
            yield f"model{m}.{name}", value


def save(torch: Any, watch: Watch, path: str) -> str:
    """Write the state and the random streams. Returns why that was not possible, or the empty string."""
    state = {name: value.detach() for name, value in _tensors(watch)}
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > MOST:
        return f"the state takes {size / 2**30:.1f} GiB"
    streams = {"torch": torch.get_rng_state(), "python": repr(random.getstate())}
    if torch.cuda.is_initialized():
        streams["cuda"] = torch.cuda.get_rng_state_all()
    torch.save({"tensors": state, "streams": streams}, path)
    return ""


def load(torch: Any, watch: Watch, path: str) -> str:
    """Take over a state in place: memory layout, hooks and references stay. Returns why not, or the empty string."""
    import ast

    found = torch.load(path, map_location="cpu", weights_only=True)
    mine = dict(_tensors(watch))
    theirs = found["tensors"]
    unlike = sorted(mine.keys() ^ theirs.keys()) or [name for name in mine if mine[name].shape != theirs[name].shape]
    if unlike:
        return f"{unlike[0]} is not alike in both runs"
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(theirs[name])
    streams = found["streams"]
    torch.set_rng_state(streams["torch"])
    if "cuda" in streams and torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(streams["cuda"])
    random.setstate(ast.literal_eval(streams["python"]))
    return ""


class LateStep:
    """Keeps the gradients and the updates of the next step."""

    def __init__(self, watch: Watch, path: str, without_dropout: Callable[[list[float]], Callable[[], None]]) -> None:
        """
        Args:
            path: the npz file to write: `grad:NAME` and `update:NAME`, float32; `masks`: the probability of every
                dropout mask that would have been drawn.
            without_dropout: switches dropout off and notes the masks; returns what switches it on again.
        """
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._watch = watch
        self._path = Path(path)
        self._kept: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._handle = register_optimizer_step_pre_hook(self._before_step)
        self._masks: list[float] = []
        self._dropout_on = without_dropout(self._masks)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for name, parameter, owner in _parameters(self._watch):
            if owner is optimizer and name not in self._before:
                self._before[name] = sampled(parameter)
                gradient = parameter.grad
                if gradient is not None and not gradient.is_sparse:
                    self._kept[f"grad:{name}"] = sampled(gradient)

    def finish(self) -> None:
        """The step has ended: write what was kept, and let dropout act again."""
        import numpy

        self._handle.remove()
        self._dropout_on()
        for name, parameter, _ in _parameters(self._watch):
            if name in self._before:
                self._kept[f"update:{name}"] = sampled(parameter) - self._before[name]
        numpy.savez(self._path, masks=numpy.asarray(self._masks), **self._kept)
