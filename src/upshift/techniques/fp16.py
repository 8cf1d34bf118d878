"""float16 mixed precision with a scaled loss, for devices that multiply float16 and not bfloat16 (V100, T4, Turing).

Idea. As with bfloat16, products run in 16 bits around every call of the model, and weights, gradients and optimizer
state stay float32. float16 has more mantissa (11 bits) but ends at 65504 and 6e-8: gradients would vanish. So the loss
is multiplied before each backward pass, and the gradients are divided once they are complete, before anything looks at
them. Where one of them has overflowed, the optimizer makes no step and the scale is halved; after many good updates it
is doubled. All of this is torch's own GradScaler.
Skipped updates. The batch counts as trained, and schedule and average of weights go on: both follow the data, so that a
training ends where it was declared to. Ranks agree, so that all skip or none does.
Limits. Declared jobs only: in a script whatever reads gradients (clipping, logging, hooks) would have to be found and
shown other ones. A loss that is not finite is no overflow of a gradient: it is treated as without this technique.

Sources: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740), section 3.2; torch.amp.GradScaler and
docs.pytorch.org/docs/stable/notes/amp_examples.html (unscaling before clipping, once an update).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, BackwardSeen, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.autocast import AutocastApplied
from upshift.sites.protocol import SettingSpec

if TYPE_CHECKING:
    import torch

#: A gradient that is not finite at this scale is not so because of the scale. GradScaler itself has no such bound, and
#: would skip for ever; sums over many samples do need scales below 1.
LEAST_SCALE = 2.0**-16

JOBS_ONLY = "the loss of a script cannot be scaled unseen by what reads its gradients: fp16 acts in declared jobs only"


class ScaledFloat16(AutocastApplied):
    """float16 around the calls of one model, and a scaled loss.

    Attributes:
        skipped: updates of this process that were left out. problem: why no scale is small enough; empty as a rule.
    """

    def __init__(self, seen: BackwardSeen, device: torch.device, scale: float, interval: int) -> None:
        """
        Args:
            scale: what the first losses are multiplied by. interval: good updates after which it is doubled.
        """
        import torch

        super().__init__(seen.module, device, torch.float16)
        self.note += f", losses scaled by {scale:,.0f} at first"
        self._scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=interval)
        self._agree = seen.agree
        self._pending = False
        self.skipped = 0
        self.problem = ""

    @property
    def scale(self) -> float:
        """What the next loss is multiplied by."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale. One update has one scale: it goes on where it is switched off in between."""
        if not (self._on or self._pending):
            return loss
        self._pending = True
        return self._scaler.scale(loss)

    def unscaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the gradients of `optimizer` by the scale, and adapt it; whether all of them are finite everywhere."""
        import torch

        if not self._pending:
            return True
        self._pending = False
        scaler = self._scaler
        scaler.unscale_(optimizer)
        found = scaler._found_inf_per_device(optimizer)
        # Waits for the device, as `GradScaler.step` does.
        overflowed = any(bool(item.item()) for item in found.values())
        overflows, seen = self._agree([float(overflowed), float(bool(found))])
        if not seen:  # no parameter has a gradient: nothing is learnt about the scale
            scaler.update(self.scale)
            return True
        if not found:
            found[str(self._device)] = torch.zeros((), device=self._device)
        if overflows:
            for item in found.values():
                item.fill_(1.0)
        scaler.update()
        if not overflows:
            return True
        self.skipped += 1
        if self.scale < LEAST_SCALE:
            self.problem = f"gradients are not finite, however little the loss is scaled (by {self.scale:.3g} now)"
        return False

    def state_dict(self) -> dict[str, Any]:
        """Scale, and good updates since it last changed."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that scale. How it grows is a setting, not a state."""
        own = self._scaler.state_dict()
        self._scaler.load_state_dict(own | {key: state[key] for key in ("scale", "_growth_tracker")})


def unfit(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Why a loss cannot be scaled in a training of this module by this optimizer; empty where it can."""
    import torch

    trained = [item for item in module.parameters() if item.requires_grad]
    dtypes = {item.dtype for item in module.parameters() if item.is_floating_point()}
    if not trained:
        return "the model is not trained"
    if dtypes & {torch.float16, torch.bfloat16}:
        return "the model has half-precision parameters already"
    if torch.float64 in dtypes:
        return "the model is float64, so its precision is wanted"
    if torch.float32 not in dtypes:
        return "the model has no float32 parameters"
    device = trained[0].device
    if device.type not in ("cpu", "cuda") or not torch.amp.is_autocast_available(device.type):
        return f"scaled losses were never tried on device type {device.type}"
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return f"{type(optimizer).__name__} computes gradients by itself, in a closure"
    stepped = {id(item) for group in optimizer.param_groups for item in group["params"]}
    if any(id(item) not in stepped for item in trained):
        return "the optimizer leaves out some trained parameters, whose gradients would stay scaled"
    hooked = next(_sees_gradients(module), "")
    return f"a hook on {hooked} would see scaled gradients" if hooked else ""


def _sees_gradients(module: torch.nn.Module) -> Iterator[str]:
    """Names of modules and parameters with hooks for the backward pass."""
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            yield name or type(part).__name__
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield name


class Fp16:
    """float16 autocast and torch's GradScaler, in declared jobs."""

    card: ClassVar[Card] = Card(
        name="fp16",
        summary="Runs products in float16 and scales the loss; for GPUs without bfloat16. Declared jobs only.",
        source="Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2; torch.autocast, torch.amp.GradScaler",
        sites=("backward", "model_created", "forward"),
        numerics=Numerics.ROUNDING,
        switchable="live",
        precision="bfloat16",
        targets=("forward", "backward"),
        details=(
            "For GPUs of compute capability 7.x (V100, T4, Turing); elsewhere bf16 needs no scale. Never proposed by "
            "itself: it is asked for in the plan of a job. Updates whose gradients overflow are left out, mostly one "
            "or two at the start. Acts in no script, and not where hooks see gradients."
        ),
        settings={
            "scale": SettingSpec(default=65536.0, doc="what the first losses are multiplied by", low=2.0**-16,
                                 high=2.0**60),
            "interval": SettingSpec(default=2000, doc="good updates after which the scale is doubled", low=1,
                                    high=1_000_000_000),
        },
        after=("channels_last",),
        conflicts=("bf16", "fp8"),
    )  # fmt: skip

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Another precision, the same computation, but for the updates left out."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Never applies by itself: scripts are out of its reach, and mostly there is something better."""
        facts = seen.facts
        if not any(model.trained and model.parameters > 0 for model in facts.models):
            return Verdict(False, "no trained model was seen")
        if not facts.device.startswith("cuda"):
            return Verdict(False, f"the training runs on {facts.device}, where float16 is not taken to be faster")
        if facts.bf16_native:
            return Verdict(False, "this device has native bf16 arithmetic, which needs no scaled loss")
        if facts.autocast or facts.grad_scaler:
            return Verdict(False, "the script manages its own precision")
        if facts.create_graph:
            return Verdict(False, "the script differentiates through gradients (create_graph)")
        return Verdict(False, f"{JOBS_ONLY}, where a plan names it")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts on the model and the losses of a declared job."""
        if isinstance(moment, ModelSeen):
            return NoEffect(JOBS_ONLY)  # a job has offered its loss before
        if not isinstance(moment, BackwardSeen):
            return None
        reason = unfit(moment.module, moment.optimizer)
        if reason:
            return NoEffect(reason)
        device = next(item.device for item in moment.module.parameters() if item.requires_grad)
        return ScaledFloat16(moment, device, float(settings["scale"]), int(settings["interval"]))
