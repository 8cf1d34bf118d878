"""Keep the state of an optimizer in host memory between its steps.

Idea. Moments are needed in `step` alone, activations only between steps: on the device at different times they share
its memory. Before a step the state is brought to its parameters, after it goes back to page-locked memory. The step
itself is the one it was, so the numbers are bitwise the same (unlike ZeRO-Offload, which computes it on the host).
Limits. The whole state crosses the bus twice a step (16 bytes a parameter for AdamW in float32), and while stepping all
of it is on the device. Checkpoints taken in between hold tensors of the CPU, which every optimizer loads. On the CPU
there is no other memory to go to.

Source: Ren et al. 2021, "ZeRO-Offload" (arXiv:2101.06840), for where the state goes; step hooks of
torch.optim.Optimizer.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch

#: Smaller states stay: step counters and scales.
LEAST_BYTES = 2**16


class StateOnHost(BaseApplied):
    """The state of one optimizer lies on `host` between steps. `moved`: bytes at the last step."""

    def __init__(self, optimizer: torch.optim.Optimizer, host: str = "cpu", least: int = LEAST_BYTES) -> None:
        self.note = f"the state of {type(optimizer).__name__} waits for its step in host memory"
        self._optimizer = weakref.ref(optimizer)
        self._host, self._least = host, least
        self._on = True
        self.moved = 0
        self._handles = (
            optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after),
        )  # fmt: skip

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._place(optimizer, home=True)

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._on:
            self.moved = self._place(optimizer, home=False)

    def _place(self, optimizer: torch.optim.Optimizer, *, home: bool) -> int:
        """Bring the state to its parameters, or to the host; bytes moved."""
        import torch

        moved = 0
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                size = value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
                if size < self._least or value.shape != parameter.shape:
                    continue
                if home:
                    state[key] = value.to(parameter.device, non_blocking=True)
                else:
                    copy = torch.empty_like(value, device=self._host, pin_memory=value.is_cuda)
                    copy.copy_(value)
                    state[key] = copy
                moved += size
        return moved

    def switch(self, on: bool) -> None:
        self._on = on
        optimizer = self._optimizer()
        if not on and optimizer is not None:
            self._place(optimizer, home=True)

    def effect(self) -> NoEffect | None:
        return None if self.moved else NoEffect(f"no state of {self._least:,} bytes or more was seen")

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.switch(False)


class OptimizerOffload:
    """Optimizer state in host memory between steps."""

    card: ClassVar[Card] = Card(
        name="optimizer_offload",
        summary="Keeps the optimizer's state in host memory between its steps (CUDA).",
        source="Ren et al. 2021 (arXiv:2101.06840); torch.optim step hooks",
        sites=("optimizer_created",),
        numerics=Numerics.BITWISE,
        switchable="live",
        targets=("optimizer",),
        details="Worth it where activations, not the step itself, decide the peak of memory.",
        tested_on=(),
        saves_memory=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Copies are exact."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies to optimizers on CUDA."""
        if not seen.facts.optimizers:
            return Verdict(False, "no optimizer was seen")
        if not any(item.device.startswith("cuda") for item in seen.facts.optimizers):
            return Verdict(False, "the optimizer's state is in host memory already")
        return Verdict(True, "the state can wait in host memory between steps; takes time, saves memory")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts before and after each step of an optimizer of CUDA parameters."""
        if not isinstance(moment, OptimizerSeen):
            return None
        devices = {item.device.type for group in moment.optimizer.param_groups for item in group["params"]}
        if devices != {"cuda"}:
            return NoEffect("the optimizer's state is in host memory already")
        return StateOnHost(moment.optimizer)
