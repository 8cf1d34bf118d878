"""Convolution weights and images in channels-last memory order (NHWC) instead of NCHW.

Idea: convolution kernels compute in NHWC; from NCHW they convert before and after. The order of memory is not part of a
tensor's meaning: shapes, indices, `state_dict` keys and values stay the same.
Limits: `view` of an image-shaped activation fails in this order (`reshape` works), so the first call in each mode is
watched and repeated in the old order where it fails. Outputs are handed back in the old order. A dropout mask drawn
over an image-shaped activation falls on other elements. Weights that share memory with other tensors stay as they are.
A model that is pickled whole keeps this order in the file.
Layout of optimizer state: fused CPU optimizer kernels walk memory and ignore strides, so parameters, gradients and
state must change their order together; whoever changes one here changes all.

Source: docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html; Li et al. 2016, "Optimizing Memory
Efficiency for Deep Convolutional Neural Networks on GPUs" (arXiv:1610.03618).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.attempt import BeforeCall
from upshift.sites.protocol import BaseApplied, SettingSpec

if TYPE_CHECKING:
    import torch

_FLAT = ("Conv2d", "ConvTranspose2d")
_VOLUME = ("Conv3d", "ConvTranspose3d")

#: Optimizers seen in this process: their state must follow their parameters also when a model is given back.
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()


def weights(module: torch.nn.Module, volumes: bool) -> list[torch.nn.Parameter]:
    """Convolution weights of `module` (4-D, with `volumes` also 5-D) that own their memory alone, each once."""
    import torch

    kinds: tuple[type[torch.nn.Module], ...] = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    if volumes:
        kinds += (torch.nn.Conv3d, torch.nn.ConvTranspose3d)
    found: dict[int, torch.nn.Parameter] = {}
    for layer in module.modules():
        weight = layer._parameters.get("weight") if isinstance(layer, kinds) else None
        if weight is None or isinstance(weight, torch.nn.parameter.UninitializedParameter):
            continue
        if type(weight) is torch.nn.Parameter and weight.dim() in (4, 5) and _owns_memory(weight):
            found[id(weight)] = weight
    return list(found.values())


def _owns_memory(tensor: torch.Tensor) -> bool:
    import torch

    if tensor.layout is not torch.strided or bool(cast(Any, tensor).is_shared()):
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=_format(tensor.dim(), True))


def _format(dimensions: int, last: bool) -> torch.memory_format:
    import torch

    if not last:
        return torch.contiguous_format
    return torch.channels_last if dimensions == 4 else torch.channels_last_3d


def _same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory (strides of dimensions of size one mean nothing)."""
    return all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size != 1)


def align_state(optimizer: torch.optim.Optimizer) -> int:
    """Bring gradients and optimizer state into their parameter's memory order; values stay the same.

    Returns how many tensors were rewritten.
    """
    import torch

    changed = 0
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not isinstance(parameter, torch.Tensor) or parameter.dim() not in (4, 5):
                    continue
                state = optimizer.state.get(parameter)
                tensors = [parameter.grad, *(state.values() if state else ())]
                for tensor in tensors:
                    if (
                        isinstance(tensor, torch.Tensor)
                        and tensor.layout is torch.strided
                        and tensor.shape == parameter.shape
                        and not _same_order(tensor, parameter)
                    ):
                        moved = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device)
                        tensor.data = moved.copy_(tensor)
                        changed += 1
    return changed


class _Model(BaseApplied):
    def __init__(self, module: torch.nn.Module, found: list[torch.nn.Parameter], volumes: bool) -> None:
        self.note = f"{len(found)} convolution weights of {type(module).__name__} in channels-last order"
        self._weights = [weakref.ref(weight) for weight in found]
        self._before = {id(weight): weight.stride() for weight in found}
        self._shapes = {weight.shape: weight.stride() for weight in found}
        self._dimensions = (4, 5) if volumes else (4,)
        self._on = False
        self._tried: set[bool] = set()
        self._refused = ""
        self.switch(True)

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._on:
            return call(*args, **kwargs)
        converted = tuple(self._convert(item, True) for item in args)
        keywords = {name: self._convert(item, True) for name, item in kwargs.items()}
        if module.training in self._tried:
            return self._back(call(*converted, **keywords))
        before = BeforeCall(module, _device(module))
        try:
            output = call(*converted, **keywords)
        except RuntimeError as error:
            before.restore()
            self.switch(False)
            output = call(*args, **kwargs)  # raises again where the script itself is at fault
            self._refused = f"the model needs its activations in the usual order ({str(error).splitlines()[0]})"
            return output
        self._tried.add(module.training)
        return self._back(output)

    def _convert(self, value: Any, last: bool) -> Any:
        import torch

        if isinstance(value, torch.Tensor) and value.dim() in self._dimensions and value.layout is torch.strided:
            if last and not (value.is_floating_point() and value.is_contiguous()):
                return value
            return value.contiguous(memory_format=_format(value.dim(), last))
        return value

    def _back(self, output: Any) -> Any:
        """Images the script gets back lie as it expects them; it may `view` them."""
        import torch

        if isinstance(output, torch.Tensor):
            return self._convert(output, False)
        if type(output) is tuple:
            return tuple(self._convert(item, False) for item in output)
        if type(output) is list:
            return [self._convert(item, False) for item in output]
        if type(output) in (dict, OrderedDict):
            return type(output)((name, self._convert(item, False)) for name, item in output.items())
        return output

    def switch(self, on: bool) -> None:
        if on == self._on or (on and self._refused):
            return
        import torch

        alive = [weight for reference in self._weights if (weight := reference()) is not None]
        with torch.no_grad():
            for weight in alive:
                for tensor in (weight, weight.grad):
                    if tensor is None or tensor.layout is not torch.strided:
                        continue
                    if on:
                        tensor.data = tensor.data.contiguous(memory_format=_format(tensor.dim(), True))
                    else:
                        old = torch.empty_strided(
                            tensor.shape, self._before[id(weight)], dtype=tensor.dtype, device=tensor.device
                        )
                        tensor.data = old.copy_(tensor)
        self._on = on
        for optimizer in list(_optimizers):
            align_state(optimizer)

    def written(self, tensor: torch.Tensor) -> torch.Tensor:
        """A checkpoint has the script's own order: safetensors refuses this one, and a fused optimizer that meets
        state in another order than its parameters corrupts them without a word.

        Known by shape, so that copies (averages of the weights, optimizer state) are put in order too.
        """
        import torch

        strides = self._shapes.get(tensor.shape) if self._on else None
        if strides is None or tensor.is_contiguous() or not _last(tensor):
            return tensor
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def effect(self) -> NoEffect | None:
        return NoEffect(self._refused) if self._refused else None

    def close(self) -> None:
        self.switch(False)


def _device(module: torch.nn.Module) -> torch.device:
    """The accelerator that a parameter is on, else the CPU."""
    import torch

    return next((item.device for item in module.parameters() if item.device.type == "cuda"), torch.device("cpu"))


class _Optimizer(BaseApplied):
    """Keeps state that was loaded from a checkpoint in the order of the parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._seen = optimizer.state
        self._fused = any(group.get("fused") for group in optimizer.param_groups)
        align_state(optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        # `load_state_dict` replaces the state. A fused optimizer of the script's own must not meet one mismatch.
        if self._fused or optimizer.state is not self._seen:
            self._seen = optimizer.state
            align_state(optimizer)

    def switch(self, on: bool) -> None:
        """Nothing: state follows when the model's weights change."""


class ChannelsLast:
    """Channels-last memory order for convolutions."""

    card: ClassVar[Card] = Card(
        name="channels_last",
        summary="Stores images and convolution weights channels-last, the order convolution kernels compute in.",
        source="PyTorch memory format tutorial; Li et al. 2016 (arXiv:1610.03618)",
        sites=("model_created", "forward", "optimizer_created", "step", "checkpoint"),
        numerics=Numerics.ROUNDING,
        switchable="live",
        targets=("forward", "backward"),
        details="Tensors in a checkpoint are written in the order they have without this technique.",
        settings={
            "volumes": SettingSpec(default=False, doc="3-D convolutions too (channels_last_3d)"),
        },
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Another order of sums; with dropout the mask may fall on other elements."""
        dropout = any(name in model.layers for model in facts.models for name in _DROPOUTS)
        return Numerics.RESEEDS if dropout else Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to trained models with convolutions over images or volumes."""
        facts = seen.facts
        trained = [model for model in facts.models if model.trained]
        flat = _count(trained, _FLAT)
        volume = _count(trained, _VOLUME)
        if flat + volume == 0:
            return Verdict(applies=False, reason="the model has no 2-D or 3-D convolutions")
        if facts.distributed:
            return Verdict(applies=False, reason="gradients are bucketed in the old order by distributed training")
        if all(model.channels_last for model in trained if _count([model], _FLAT + _VOLUME)):
            return Verdict(applies=False, reason="the model is in channels-last order already")
        parts = [f"{flat} 2-D" if flat else "", f"{volume} 3-D" if volume else ""]
        return Verdict(
            applies=True,
            reason=f"the model has {' and '.join(part for part in parts if part)} convolutions",
            candidates=({"volumes": bool(volume)},),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Converts a model before its first call; keeps an optimizer's state in step with it."""
        import torch

        if isinstance(moment, OptimizerSeen):
            if not any(item.dim() in (4, 5) for item in _tensors(moment.optimizer)):
                return None
            _optimizers.add(moment.optimizer)
            return _Optimizer(moment.optimizer)
        if not isinstance(moment, ModelSeen):
            return None
        if type(moment.module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            return NoEffect("gradients are bucketed in the old order by distributed training")
        volumes = bool(settings.get("volumes", False))
        found = weights(moment.module, volumes)
        if not found:
            return NoEffect("the model has no convolution weights of its own")
        # Weights that are in order already (by the script, or through another root module) are not ours to change back.
        moving = [item for item in found if not _last(item)]
        images = [
            item
            for item in (*moment.args, *moment.kwargs.values())
            if isinstance(item, torch.Tensor) and item.dim() in (4, 5)
        ]
        if not moving and all(_last(item) for item in images):
            return NoEffect("the model is in channels-last order already")
        return _Model(moment.module, moving, volumes)


_DROPOUTS = ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d")


def _tensors(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (item for group in optimizer.param_groups for item in group["params"] if hasattr(item, "dim"))


def _count(models: Iterable[Any], kinds: tuple[str, ...]) -> int:
    return sum(model.layers.get(kind, 0) for model in models for kind in kinds)
