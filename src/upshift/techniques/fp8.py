"""Linear layers in float8: inputs, weights and gradients of their products are rounded to 8 bits, with a scale each.

Idea. Tensor cores from compute capability 8.9 on multiply float8 twice as fast as bfloat16. Each tensor is scaled by
its own largest value to the range of the format (e4m3 forward, e5m2 for gradients), and products are added up in higher
precision (Micikevicius et al. 2022). Weights, optimizer and state dict stay what they are.
Numbers. e4m3 has 3 bits of mantissa, so each factor is off by up to 2^-4: far beyond what a check of single updates can
tell from a mistake. It is therefore held against the user's own metric, like everything that changes the training.
Limits. Casting costs more than it gains in small layers, and nearly always without `compile`, which fuses it. Layers
with hooks, or whose sizes are no multiples of 16, stay as they are.

Sources: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433); `torchao.float8`.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from upshift._optional import available, require
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch

#: First compute capability with float8 products.
CAPABILITY = (8, 9)

#: What both sizes of a layer must be multiples of, and be at least.
MULTIPLE, LEAST = 16, 512

MISSING = "torchao is not installed (pip install 'upshift[lowbit]')"


class InFloat8(BaseApplied):
    """Linear layers whose calls go through torchao's float8 layer on the very same parameters."""

    def __init__(self, layers: list[torch.nn.Linear], *, emulate: bool = False) -> None:
        """
        Args:
            layers: not empty. emulate: round to float8 and multiply as before, on any device.
        """
        package = require("torchao.float8", extra="lowbit", why="Float8 training")
        kind = require("torchao.float8.float8_linear", extra="lowbit", why="Float8 training").Float8Linear
        settings = package.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
        self.note = f"{len(layers)} linear layers in float8"
        self._on = True
        self._placed: list[tuple[weakref.ref[torch.nn.Module], Any]] = []
        for layer in layers:
            # The module stays what it is: only what `Module.__call__` looks up is set.
            called = functools.partial(self._call, layer, kind.from_float(layer, config=settings))
            layer._compiled_call_impl = called
            self._placed.append((weakref.ref(layer), weakref.ref(called)))

    def _call(self, layer: torch.nn.Linear, twin: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._on or not layer.training or twin.weight is not layer.weight:
            plain: Any = layer._call_impl
            return plain(*args, **kwargs)
        return twin(*args, **kwargs)

    def switch(self, on: bool) -> None:
        self._on = on

    def close(self) -> None:
        self._on = False
        for reference, placed in self._placed:
            layer, called = reference(), placed()
            if layer is not None and called is not None and layer.__dict__.get("_compiled_call_impl") is called:
                del layer._compiled_call_impl


def eligible(module: torch.nn.Module, least: int = LEAST) -> list[torch.nn.Linear]:
    """Trained linear layers that are large enough, of fitting sizes, and without hooks."""
    import torch

    found = []
    for layer in module.modules():
        if type(layer) is not torch.nn.Linear or layer.__dict__.get("_compiled_call_impl") is not None:
            continue
        sizes = layer.in_features, layer.out_features
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(size % MULTIPLE or size < least for size in sizes) or any(layer.__dict__.get(name) for name in hooks):
            continue
        if layer.weight.requires_grad and layer.weight.dtype in (torch.float32, torch.bfloat16):
            found.append(layer)
    return found


class Fp8:
    """Large linear layers in float8."""

    card: ClassVar[Card] = Card(
        name="fp8",
        summary="Computes large linear layers in float8 on GPUs that have it (torchao).",
        source="Micikevicius et al. 2022 (arXiv:2209.05433); torchao.float8",
        sites=("model_created",),
        numerics=Numerics.CHANGES_TRAINING,
        switchable="live",
        targets=("forward", "backward"),
        details=(
            f"Needs compute capability 8.9 and the extra lowbit. Layers from {LEAST} to {LEAST} values on, in training "
            "mode. Rounds factors to 3 bits of mantissa, so the result is judged by the user's metric."
        ),
        after=("bf16",),
        conflicts=("compile", "activation_checkpointing"),
        tested_on=(),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Three bits of mantissa."""
        return Numerics.CHANGES_TRAINING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to models with linear layers on CUDA; the capability is known in the training process alone."""
        facts = seen.facts
        if not facts.device.startswith("cuda"):
            return Verdict(False, f"the training runs on {facts.device}, which has no float8 products")
        if not any(item.trained and item.layers.get("Linear") for item in facts.models):
            return Verdict(False, "no trained model with linear layers was seen")
        if facts.create_graph:
            return Verdict(False, "the script differentiates twice (create_graph)")
        if not available("torchao"):
            return Verdict(False, MISSING)
        return Verdict(True, "linear layers on a GPU that may have float8 products")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts on the large linear layers of a root module on CUDA."""
        if not isinstance(moment, ModelSeen):
            return None
        import torch

        device = next((item.device for item in moment.module.parameters() if item.requires_grad), None)
        if device is None:
            return NoEffect("the model is not trained")
        if device.type != "cuda" or torch.version.hip is not None:
            return NoEffect(f"the model is on {device}, which has no float8 products")
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            return NoEffect("the GPU is older than compute capability 8.9")
        if not available("torchao"):
            return NoEffect(MISSING)
        layers = eligible(moment.module)
        return InFloat8(layers) if layers else NoEffect(f"no linear layer has {LEAST} inputs and outputs or more")
