"""Keep what the backward pass needs in host memory instead of on the GPU.

Idea. Autograd asks before it keeps a tensor and when it wants it back (saved-tensor hooks). In between it lies in
page-locked host memory, so that a step needs the activations of one operation at a time on the device (Rhu et al.
2016). This is `torch.autograd.graph.save_on_cpu`, without parameters and small tensors, which stay where they are.
Numbers: bitwise, copies are exact.
Limits. Every saved tensor crosses the bus twice and is waited for, which may cost more time than computing cheap
operations again. A saved tensor that is changed in place before its backward pass is not noticed. On the CPU there is
no other memory to go to.

Sources: Rhu et al. 2016, "vDNN" (arXiv:1602.08124); docs.pytorch.org/docs/stable/autograd.html (saved-tensor hooks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch

#: Smaller tensors stay: a copy costs the same time however little it carries.
LEAST_BYTES = 2**20


class Offloaded(BaseApplied):
    """What calls of a root module save for the backward pass lies on `host`. `moved` counts bytes."""

    def __init__(self, module: torch.nn.Module, host: str = "cpu", least: int = LEAST_BYTES) -> None:
        self.note = f"activations of {type(module).__name__} wait for the backward pass in host memory"
        self._host, self._least = host, least
        self._on = True
        self.moved = 0

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        import torch

        if not self._on or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        own = {item.untyped_storage().data_ptr() for item in module.parameters()}

        def pack(tensor: torch.Tensor) -> Any:
            size = tensor.numel() * tensor.element_size()
            if size < self._least or tensor.layout is not torch.strided:
                return tensor
            if tensor.untyped_storage().data_ptr() in own:
                return tensor
            self.moved += size
            pinned = tensor.is_cuda
            copy = torch.empty_like(tensor, device=self._host, pin_memory=pinned)
            copy.copy_(tensor)
            return tensor.device, copy

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            device, copy = packed
            found: torch.Tensor = copy.to(device)
            return found

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return call(*args, **kwargs)

    def switch(self, on: bool) -> None:
        self._on = on

    def effect(self) -> NoEffect | None:
        return None if self.moved else NoEffect(f"nothing of {self._least:,} bytes or more was saved for backward")

    def close(self) -> None:
        self._on = False


class ActivationOffload:
    """Activations in host memory between forward and backward."""

    card: ClassVar[Card] = Card(
        name="activation_offload",
        summary="Keeps activations in host memory until the backward pass needs them (CUDA).",
        source="Rhu et al. 2016 (arXiv:1602.08124); torch.autograd.graph.saved_tensors_hooks",
        sites=("model_created", "forward"),
        numerics=Numerics.BITWISE,
        switchable="live",
        targets=("forward", "backward"),
        details=(
            "For models that fit no other way: every activation crosses the bus twice. Not for scripts that change "
            "saved tensors in place (autograd would not notice in the copy)."
        ),
        conflicts=("activation_checkpointing", "compile"),
        tested_on=(),
        saves_memory=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Copies are exact."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies to trained models on CUDA."""
        facts = seen.facts
        if not facts.device.startswith("cuda"):
            return Verdict(False, f"the training runs on {facts.device}: its activations are in host memory already")
        if not any(item.trained and item.parameters for item in facts.models):
            return Verdict(False, "no trained model was seen")
        if facts.create_graph:
            return Verdict(False, "the script differentiates twice (create_graph)")
        return Verdict(True, "activations can wait in host memory; takes time, saves memory")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts around the calls of a root module on CUDA."""
        if not isinstance(moment, ModelSeen):
            return None
        device = next((item.device for item in moment.module.parameters() if item.requires_grad), None)
        if device is None:
            return NoEffect("the model is not trained")
        if device.type != "cuda":
            return NoEffect(f"the model is on {device}: its activations are in host memory already")
        return Offloaded(moment.module)
