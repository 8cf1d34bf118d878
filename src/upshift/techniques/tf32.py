"""TensorFloat-32 for float32 matrix products on NVIDIA GPUs.

Idea: from compute capability 8.0 on, tensor cores multiply float32 numbers rounded to 10 bits of mantissa and add them
up in float32. Convolutions do so in PyTorch by default; matrix products do not.
Limits: inputs are rounded to 2^-11 relative, like bfloat16 to 2^-8. Nothing changes for products in 16 bits (autocast)
or in float64. What the script has decided about float32 products, either way, is left alone.

PyTorch has two interfaces for this (`fp32_precision` since 2.9; `allow_tf32` and `set_float32_matmul_precision` before)
and refuses to answer through the old one where only the new one was used. Setting the old flag keeps both in agreement,
so whoever asks later (the script, the compiler) gets an answer; the new one tells "never set" from "off".

Sources: docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32 (TF32) on Ampere (and later) devices"; NVIDIA
A100 Tensor Core GPU Architecture, 2020.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied

#: First compute capability with TensorFloat-32.
CAPABILITY = (8, 0)

#: Float32 products on tensor cores run up to 8 times as fast; a whole model's gain is bounded by memory much earlier.
ASSUMED_FACTOR = 2.0

#: `fp32_precision` of a process in which nobody has decided.
UNDECIDED = "none"


def _matmul() -> Any:
    import torch

    return torch.backends.cuda.matmul


def _allow(on: bool) -> None:
    """Both interfaces say `on`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions recommend the new interface here
        _matmul().allow_tf32 = on


class Tf32Applied(BaseApplied):
    """Float32 products of this process in TensorFloat-32."""

    def __init__(self) -> None:
        self.note = "float32 matrix products in TensorFloat-32"
        self._on = False
        self._lost = ""
        self.switch(True)

    def switch(self, on: bool) -> None:
        if self._lost or on == self._on:
            return
        if not on and _matmul().fp32_precision != "tf32":
            self._lost = "the script has set the precision of float32 products itself since"
            return
        _allow(on)
        if not on:
            _matmul().fp32_precision = UNDECIDED
        self._on = on

    def effect(self) -> NoEffect | None:
        if self._on and _matmul().fp32_precision != "tf32":
            return NoEffect("the script has set the precision of float32 products itself since")
        return NoEffect(self._lost) if self._lost else None

    def close(self) -> None:
        self.switch(False)


class Tf32:
    """`torch.backends.cuda.matmul`: TensorFloat-32 instead of float32."""

    card: ClassVar[Card] = Card(
        name="tf32",
        summary="Computes float32 matrix products in TensorFloat-32 on NVIDIA GPUs.",
        source="docs.pytorch.org/docs/stable/notes/cuda.html (TensorFloat-32); NVIDIA A100 architecture, 2020",
        sites=("model_created",),
        numerics=Numerics.ROUNDING,
        switchable="live",
        # Finer than bfloat16 by three bits; how much finer its updates are was never measured.
        precision="bfloat16",
        targets=("forward", "backward"),
        details=(
            "Needs compute capability 8.0. Convolutions use TensorFloat-32 in PyTorch anyway. Nothing is done where "
            "the script has set the precision of float32 products, or trains under autocast or in half precision."
        ),
        tested_on=(),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Inputs of products are rounded to 10 bits of mantissa."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to trained float32 models on CUDA without mixed precision of their own."""
        facts = seen.facts
        models = [model for model in facts.models if model.trained and model.parameters > 0]
        refusal = ""
        if not facts.device.startswith("cuda"):
            refusal = f"the training runs on {facts.device}; TensorFloat-32 is arithmetic of NVIDIA GPUs"
        elif facts.autocast:
            refusal = "the script uses autocast, so its products are in 16 bits"
        elif facts.create_graph:
            refusal = "the script differentiates through gradients (create_graph), which rounding would disturb"
        elif not any("float32" in model.dtypes for model in models):
            refusal = "no trained float32 model was seen"
        elif facts.bf16_native is False:
            refusal = "the GPU is older than compute capability 8.0"
        elif seen.floor is not None and seen.floor.dtype == "tf32":
            refusal = "float32 products are in TensorFloat-32 already"
        if refusal:
            return Verdict(applies=False, reason=refusal)
        share = min(seen.anatomy.share("forward") + seen.anatomy.share("backward"), 1.0)
        return Verdict(
            applies=True,
            reason="a float32 model on a GPU that may have TensorFloat-32",
            gain=1.0 / (1.0 - share * (1.0 - 1.0 / ASSUMED_FACTOR)) if share else None,
            rests_on=f"shares of forward and backward, each assumed {ASSUMED_FACTOR}x faster" if share else "",
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Sets the flag before the first call of a float32 model, when the script has set what it wants."""
        if not isinstance(moment, ModelSeen):
            return None
        import torch

        floating = [item for item in moment.module.parameters() if item.dtype is torch.float32]
        if not floating:
            return NoEffect("the model has no float32 parameters")
        device = floating[0].device
        if device.type != "cuda" or torch.version.hip is not None:
            return NoEffect(f"TensorFloat-32 is arithmetic of NVIDIA GPUs; the model is on {device}")
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            return NoEffect("the GPU is older than compute capability 8.0")
        if torch.is_autocast_enabled("cuda"):
            return NoEffect("the script calls the model inside its own autocast")
        now = _matmul().fp32_precision
        if now != UNDECIDED:
            return NoEffect(f"the precision of float32 products is set already ({now})")
        return Tf32Applied()
