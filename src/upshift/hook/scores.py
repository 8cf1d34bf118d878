"""The loss that a script computes when it evaluates: torch's own loss functions, called without gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.measure.steps import StepRecord
from upshift.records.recipe import Scores

_LOSSES = (
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div",
)  # fmt: skip
#: Passes that are told.
MOST = 200


class Evaluations:
    """Sums of the loss, and samples, of each pass of evaluation."""

    def __init__(self) -> None:
        #: Steps before the pass -> loss function -> [sum over the samples, samples].
        self.passes: list[tuple[int, dict[str, list[Any]]]] = []
        self.open: dict[str, list[Any]] = {}
        self.steps = 0

    def install(self, torch: Any, patches: Patches) -> None:
        """Listen to the loss functions; with gradients on they are passed through."""
        functional = torch.nn.functional
        for name in _LOSSES:
            patches.set(functional, name, self._listening(torch, name, getattr(functional, name)))

    def _listening(self, torch: Any, name: str, original: Any) -> Any:
        grad_enabled, compiling = torch.is_grad_enabled, torch.compiler.is_compiling

        def loss(*args: Any, **kwargs: Any) -> Any:
            value = original(*args, **kwargs)
            if not compiling() and not grad_enabled():
                self._add(name, value, args, kwargs)
            return value

        return like(original, loss)

    def _add(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target: Any = args[1] if len(args) > 1 else kwargs.get("target")
        samples = len(target) if getattr(target, "ndim", 0) else 1
        if value.ndim:
            return
        # Stays a tensor: reading it would wait for a device.
        value = value.detach() * (1 if kwargs.get("reduction") == "sum" else samples)
        sums = self.open.setdefault(name, [0.0, 0])
        sums[0] = sums[0] + value
        sums[1] += samples

    def step_ended(self, record: StepRecord) -> None:
        """A global step has ended; what was evaluated since the last came before it."""
        if self.open and record.nograd_calls and len(self.passes) < MOST:
            self.passes.append((self.steps, self.open))
        self.open = {}
        self.steps += 1

    def scores(self, losses: Sequence[float]) -> tuple[Scores, ...]:
        """Passes over as many samples each, by the loss function most of them used.

        Args:
            losses: of the training steps; a pass is told beside their mean since the pass before.
        """
        last = [(self.steps, self.open)] if self.open else []
        kinds = Counter((name, sums[1]) for _, found in [*self.passes, *last] for name, sums in found.items())
        if not kinds:
            return ()
        name, samples = max(kinds, key=lambda kind: (kinds[kind], kind[1]))
        told, before = [], 0
        for step, found in [*self.passes, *last]:
            sums = found.get(name)
            since = losses[before:step]
            if sums is None or sums[1] != samples or not since:
                continue
            told.append(Scores(step, math.fsum(since) / len(since), _read(sums[0]) / samples))
            before = step
        return tuple(item for item in told if math.isfinite(item.training) and math.isfinite(item.evaluation))


def _read(value: Any) -> float:
    """NaN where the value was made inside a transformation and has none outside of it."""
    try:
        return float(value)
    except (RuntimeError, ValueError, TypeError):
        return math.nan
