"""bfloat16 mixed precision around every call of a float32 root module.

Idea: matrix products and convolutions run in bfloat16, reductions and losses stay in float32, and what the script gets
back has the dtype it would have had. Weights, gradients and optimizer state stay float32.
Limits: bfloat16 keeps 8 bits of mantissa, so every product rounds at about 2^-9 relative. Only root calls are wrapped:
losses computed by the script itself stay in float32. No loss scaling is added (bfloat16 has float32's range), which is
why fp16 is not offered. Casts of weights are not cached: a cast made under `no_grad` and found in the cache by a later
forward of the same region has no gradient (pytorch#112583), and whether a forward switches grad mode cannot be known.

Sources: Micikevicius et al. 2018, "Mixed Precision Training"; Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep
Learning Training"; docs.pytorch.org/docs/stable/amp.html.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Anatomy, Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch

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
    """`value` with every bfloat16 tensor in it as float32.

    Looks into tuples, named tuples, lists, dicts (also `ModelOutput`), dataclasses and `torch.distributions`. Returns
    the very same object where nothing had to change; containers are copied, never changed in place. The cast is
    differentiable.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype is torch.bfloat16 else value
    if isinstance(value, tuple):
        items = [to_float32(item) for item in value]
        if _same(items, value):
            return value
        plain = type(value) is tuple or not hasattr(value, "_fields")
        return type(value)(items) if plain else type(value)(*items)
    if isinstance(value, list):
        items = [to_float32(item) for item in value]
        if _same(items, value):
            return value
        changed = copy.copy(value)
        changed[:] = items
        return changed
    if isinstance(value, dict):
        entries = {key: to_float32(item) for key, item in value.items()}
        if all(entries[key] is item for key, item in value.items()):
            return value
        duplicate = copy.copy(value)
        for key, item in entries.items():
            duplicate[key] = item
        return duplicate
    if isinstance(value, torch.distributions.Distribution) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return _attributes_to_float32(value)
    return value


def _attributes_to_float32(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    else:
        names = list(vars(value))
    changed = {}
    for name in names:
        old = getattr(value, name)
        new = to_float32(old)
        if new is not old:
            changed[name] = new
    if not changed:
        return value
    duplicate = copy.copy(value)
    for name, new in changed.items():
        object.__setattr__(duplicate, name, new)  # frozen dataclasses too
    return duplicate


def _same(new: list[Any], old: tuple[Any, ...] | list[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


class _State:
    """What a failed first call may have changed: buffers and random streams."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        import random

        import torch

        self.buffers = [(item, item.detach().clone()) for item in module.buffers()]
        self.python = random.getstate()
        self.cpu = torch.get_rng_state()
        self.device = device
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        import random

        import torch

        with torch.no_grad():
            for item, old in self.buffers:
                item.copy_(old)
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class _Autocast(BaseApplied):
    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.note = f"bfloat16 autocast around calls of {type(module).__name__}"
        self._device = device
        self._on = True
        self._tried: set[bool] = set()
        self._calls = 0
        self._skipped = 0
        self._refused = ""

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        import torch

        kind = self._device.type
        if not self._on or self._refused:
            return call(*args, **kwargs)
        if torch.is_autocast_enabled(kind):
            self._skipped += 1
            return call(*args, **kwargs)
        # The first call in each mode is watched: an operation without a bfloat16 kernel raises there.
        first = module.training not in self._tried
        before = _State(module, self._device) if first else None
        try:
            with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):
                output = call(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if before is None:
                raise
            before.restore()
            output = call(*args, **kwargs)  # raises again where the script itself is at fault
            self._refused = f"the model does not run in bfloat16 ({str(error).splitlines()[0]})"
            return output
        self._tried.add(module.training)
        self._calls += 1
        return to_float32(output)

    def switch(self, on: bool) -> None:
        self._on = on

    def effect(self) -> NoEffect | None:
        if self._refused:
            return NoEffect(self._refused)
        if self._skipped and not self._calls:
            return NoEffect("the script calls the model inside its own autocast")
        return None

    def close(self) -> None:
        self._on = False


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
        return _Autocast(moment.module, device)
