"""cuDNN measures which of its convolution kernels is fastest, instead of guessing.

Idea: with `torch.backends.cudnn.benchmark` every new shape of a convolution is run once with each kernel that fits, and
the fastest is kept.
Limits: each new input shape costs such a measurement, so inputs of many shapes lose: beyond `SHAPES` the flag is taken
back. Kernels differ in the order of sums. Which one wins can differ between runs of the same script, so results are not
the same bits from run to run.

Source: docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.benchmark; PyTorch performance tuning guide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.measure.shapes import Shapes
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch

#: Input shapes a model may have; each is measured anew.
SHAPES = 8


def _cudnn() -> Any:
    import torch

    return torch.backends.cudnn


class CudnnBenchmarkApplied(BaseApplied):
    """The flag, and a count of the input shapes."""

    def __init__(self) -> None:
        self.note = "cuDNN measures its convolution kernels for each input shape"
        self._shapes = Shapes(SHAPES)
        self._lost = ""
        self._set = True
        _cudnn().benchmark = True

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call itself; its input shapes are counted."""
        if self._set and self._shapes.too_many(args, kwargs):
            self._lost = f"inputs come in more than {SHAPES} shapes, each of which would be measured"
            self.close()
        return call(*args, **kwargs)

    def effect(self) -> NoEffect | None:
        if self._lost:
            return NoEffect(self._lost)
        if self._set and not _cudnn().benchmark:
            return NoEffect("the script has switched it off since")
        return None

    def close(self) -> None:
        if self._set:
            _cudnn().benchmark = False
        self._set = False


class CudnnBenchmark:
    """`torch.backends.cudnn.benchmark`."""

    card: ClassVar[Card] = Card(
        name="cudnn_benchmark",
        summary="Lets cuDNN measure which convolution kernel is fastest for each shape.",
        source="docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.benchmark",
        sites=("model_created", "forward"),
        numerics=Numerics.ROUNDING,
        switchable="process",
        targets=("forward", "backward"),
        details=(
            "Every new input shape is measured once, which is shown as a one-off cost. Not where the script asks for "
            f"deterministic kernels. Taken back where inputs come in more than {SHAPES} shapes."
        ),
        after=("channels_last", "bf16"),
        tested_on=(),
        one_off=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Other kernels add in another order."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to trained models with convolutions on CUDA."""
        facts = seen.facts
        if not facts.device.startswith("cuda"):
            return Verdict(applies=False, reason=f"the training runs on {facts.device}; cuDNN is for NVIDIA GPUs")
        layers = [model.layers for model in facts.models if model.trained]
        count = sum(number for found in layers for name, number in found.items() if name.startswith("Conv"))
        if not count:
            return Verdict(applies=False, reason="no trained model has convolution layers")
        return Verdict(applies=True, reason=f"{count} convolution layers, whose kernels cuDNN picks by rules")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Sets the flag before the first call of a model, when the script has set what it wants."""
        if not isinstance(moment, ModelSeen):
            return None
        import torch

        parameter = next(moment.module.parameters(), None)
        if parameter is None or parameter.device.type != "cuda":
            return NoEffect("the model is not on CUDA")
        if not any(isinstance(item, torch.nn.modules.conv._ConvNd) for item in moment.module.modules()):
            return NoEffect("the model has no convolution layers")
        if _cudnn().benchmark:
            return NoEffect("it is on already")
        if _cudnn().deterministic or torch.are_deterministic_algorithms_enabled():
            return NoEffect("the script asks for deterministic kernels")
        return CudnnBenchmarkApplied()
