"""bfloat16 mixed precision around every call of a float32 root module.

Idea: matrix products and convolutions run in bfloat16, reductions and losses stay in float32, and what the script gets
back has the dtype it would have had. Weights, gradients and optimizer state stay float32.
Limits: bfloat16 keeps 8 bits of mantissa, so every product rounds at about 2^-9 relative. Only root calls are wrapped:
losses computed by the script itself stay in float32. No loss scaling is needed (bfloat16 has float32's range).

Sources: Micikevicius et al. 2018, "Mixed Precision Training"; Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep
Learning Training"; docs.pytorch.org/docs/stable/amp.html.
"""

from __future__ import annotations

from typing import Any, ClassVar

from upshift.records.measurement import Anatomy, Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.autocast import AutocastApplied, in_float32

#: Assumed speed-up of forward and backward in native bfloat16; only orders the trials.
ASSUMED_FACTOR = 1.8

_HALF = {"float16", "half", "bfloat16"}


def predicted_gain(anatomy: Anatomy, factor: float = ASSUMED_FACTOR) -> float | None:
    """Amdahl's law for forward and backward becoming `factor` times faster; None where a share is unknown."""
    shares = [item.share.value for item in anatomy.phases if item.name in ("forward", "backward")]
    if len(shares) < 2 or any(share is None for share in shares):
        return None
    part = min(1.0, sum(share for share in shares if share is not None))
    return 1.0 / (1.0 - part + part / factor)


def to_float32(value: Any) -> Any:
    """`value` with every bfloat16 tensor in it as float32, see `in_float32`."""
    import torch

    return in_float32(value, torch.bfloat16)


class Bf16:
    """bfloat16 autocast, added from outside."""

    card: ClassVar[Card] = Card(
        name="bf16",
        summary="Runs matrix products and convolutions in bfloat16; weights and outputs stay float32.",
        source="Micikevicius et al. 2018 (arXiv:1710.03740); Kalamkar et al. 2019 (arXiv:1905.12322); torch.autocast",
        sites=("model_created", "forward"),
        numerics=Numerics.ROUNDING,
        switchable="live",
        precision="bfloat16",
        targets=("forward", "backward"),
        details=(
            "Nothing is added where the script has autocast, an enabled GradScaler, half-precision or float64 "
            "parameters, or differentiates gradients. Worth it only where the device computes bfloat16 natively."
        ),
        after=("channels_last",),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Another precision, the same computation."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to trained float32 models without mixed precision of their own."""
        facts = seen.facts
        models = [model for model in facts.models if model.trained and model.parameters > 0]
        dtypes = {dtype.removeprefix("torch.") for model in models for dtype in model.dtypes}
        refusal = ""
        if facts.autocast:
            refusal = "the script uses autocast already"
        elif facts.grad_scaler:
            refusal = "the script scales its loss with a GradScaler, so it manages its own precision"
        elif facts.create_graph:
            refusal = "the script differentiates through gradients (create_graph), which rounding would disturb"
        elif not models:
            refusal = "no trained model was seen"
        elif dtypes & _HALF:
            refusal = "the model has half-precision parameters already"
        elif "float64" in dtypes or "double" in dtypes:
            refusal = "the model is float64, so its precision is wanted"
        elif not dtypes & {"float32", "float"}:
            refusal = "the model has no float32 parameters"
        elif facts.bf16_native is False:
            refusal = (
                "this CPU has no native bf16 arithmetic (AMX or AVX-512 BF16)"
                if facts.device.startswith("cpu")
                else "this device has no native bf16 arithmetic"
            )
        if refusal:
            return Verdict(applies=False, reason=refusal)
        native = "has native bf16 arithmetic" if facts.bf16_native else "may have native bf16 arithmetic (not known)"
        if any(model.custom_autograd for model in models):
            native += "; a custom autograd function near it may not take it"
        gain = predicted_gain(seen.anatomy)
        rests_on = "" if gain is None else f"shares of forward and backward, each assumed {ASSUMED_FACTOR}x faster"
        return Verdict(applies=True, reason=f"a float32 model on a device that {native}", gain=gain, rests_on=rests_on)

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Wraps the calls of a float32 root module."""
        if not isinstance(moment, ModelSeen):
            return None
        import torch

        parameters = list(moment.module.parameters())
        floating = [item for item in parameters if item.is_floating_point()]
        dtypes = {item.dtype for item in floating}
        if dtypes & {torch.float16, torch.bfloat16}:
            return NoEffect("the model has half-precision parameters already")
        if torch.float64 in dtypes:
            return NoEffect("the model is float64, so its precision is wanted")
        if torch.float32 not in dtypes:
            return NoEffect("the model has no float32 parameters")
        device = next(item.device for item in floating if item.dtype is torch.float32)
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return NoEffect("this GPU has no native bf16 arithmetic")
        if not torch.amp.is_autocast_available(device.type):
            return NoEffect(f"autocast does not exist for device type {device.type}")
        return AutocastApplied(moment.module, device, torch.bfloat16)
