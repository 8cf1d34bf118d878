"""Keep the moments of an optimizer in 8 bits between its steps.

Idea. A moment is cut into blocks of 256 values, each with its own scale, and every value becomes one of 256 codes that
lie denser near zero (Dettmers et al. 2022): a quarter of the memory of float32. Before a step the moments are decoded,
after it they are encoded again, so any optimizer of torch steps as it always does.
Numbers. What is rounded is the memory of the training, every step anew: another training, judged by the user's metric.
Checkpoints hold decoded moments, which plain torch loads; encoding them gives the same codes.
Limits. While stepping all moments are in float32. Those of fewer than 4,096 values, or of sizes that are no multiple of
256, stay as they are. torchao's own optimizers decode one parameter at a time: in a declared job
`optimizer("adamw_8bit")` takes less memory.

Sources: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861); `torchao.optim`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from upshift._optional import available, require
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch

#: Values of a block, and the fewest that a moment is encoded from.
BLOCK, LEAST = 256, 4096

#: Moments of torch's optimizers -> whether they can be negative. Others (and whatever else a state holds) stay.
MOMENTS = {"exp_avg": True, "exp_avg_sq": False, "momentum_buffer": True}

MISSING = "torchao is not installed (pip install 'upshift[lowbit]')"


class In8Bits(BaseApplied):
    """The moments of one optimizer are codes between steps. `saved`: bytes less than in float32, at the last step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._kind = require("torchao.optim.subclass_8bit", extra="lowbit", why="Encoding moments").OptimState8bit
        self.note = f"moments of {type(optimizer).__name__} in 8 bits between steps"
        self._optimizer = weakref.ref(optimizer)
        self._on = True
        self.saved = 0
        self._handles = (
            optimizer.register_step_pre_hook(lambda found, *_: self._decode(found)),
            optimizer.register_step_post_hook(lambda found, *_: self._encode(found)),
            optimizer.register_state_dict_post_hook(self._plainly),
        )

    def _encode(self, optimizer: torch.optim.Optimizer) -> None:
        import torch

        self.saved = 0
        for state in optimizer.state.values() if self._on else ():
            for key, signed in MOMENTS.items():
                value = state.get(key)
                if type(value) is not torch.Tensor or value.dtype is not torch.float32 or value.numel() < LEAST:
                    continue
                if value.numel() % BLOCK or not value.is_contiguous():
                    continue
                codes = self._kind.zeros(value.shape, signed, BLOCK, value.device)
                codes.copy_(value)
                state[key] = codes
                self.saved += 3 * value.numel() - 4 * value.numel() // BLOCK

    def _decode(self, optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, self._kind):
                    state[key] = value.dequantize()

    def _plainly(self, optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
        """A state dict for everybody; its dicts are the optimizer's own, so these are new."""
        states = {
            at: {key: value.dequantize() if isinstance(value, self._kind) else value for key, value in state.items()}
            for at, state in found["state"].items()
        }
        return {**found, "state": states}

    def switch(self, on: bool) -> None:
        self._on = on
        optimizer = self._optimizer()
        if not on and optimizer is not None:
            self._decode(optimizer)

    def effect(self) -> NoEffect | None:
        return None if self.saved else NoEffect(f"no moment of {LEAST:,} values or more was seen")

    def close(self) -> None:
        self.switch(False)
        for handle in self._handles:
            handle.remove()


class LowBitOptimizer:
    """Moments in 8 bits."""

    card: ClassVar[Card] = Card(
        name="low_bit_optimizer",
        summary="Keeps the optimizer's moments in 8 bits between its steps.",
        source="Dettmers et al. 2022 (arXiv:2110.02861); torchao.optim",
        sites=("optimizer_created",),
        numerics=Numerics.CHANGES_TRAINING,
        switchable="process",
        targets=("optimizer",),
        details="Needs the extra lowbit. Moments of 4,096 values or more; checkpoints hold them in float32.",
        conflicts=("optimizer_offload",),
        saves_memory=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """The memory of the training is rounded."""
        return Numerics.CHANGES_TRAINING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to optimizers of float32 parameters with moments worth it."""
        if not any(item.parameters >= LEAST and "float32" in item.dtypes for item in seen.facts.optimizers):
            return Verdict(False, f"no optimizer of {LEAST:,} float32 parameters or more was seen")
        if not available("torchao"):
            return Verdict(False, MISSING)
        return Verdict(True, "moments can be kept in 8 bits; takes time, saves memory")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts before and after each step of an optimizer of torch."""
        if not isinstance(moment, OptimizerSeen):
            return None
        optimizer = moment.optimizer
        if not type(optimizer).__module__.startswith("torch.optim"):
            return NoEffect(f"{type(optimizer).__name__} is none of torch's own optimizers")
        if not any(item.numel() >= LEAST for group in optimizer.param_groups for item in group["params"]):
            return NoEffect(f"no parameter has {LEAST:,} values or more")
        return In8Bits(optimizer) if available("torchao") else NoEffect(MISSING)
