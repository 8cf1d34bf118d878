"""A learning rate that falls to zero, for a script that keeps it constant.

Idea: near the end the noise of the gradient, not the distance to the optimum, keeps the loss up; a rate that falls to
zero averages it away, so that a shorter training reaches the same quality.
Limits: the number of steps must be known before the first one; after it the rate is zero, which is reported. A script
with a schedule of its own is left alone. A resumed run begins the schedule anew.

Sources: Bergsma et al. 2025, "Straight to Zero" (arXiv:2502.15938), linear; Loshchilov and Hutter 2016, "SGDR"
(arXiv:1608.03983), cosine; Defazio et al. 2023 (arXiv:2310.07831) on why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.records.recipe import sets_own_steps
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import SettingSpec
from upshift.sites.rate import RateApplied

if TYPE_CHECKING:
    import torch

KINDS = ("linear", "cosine")


def multiplier(kind: str, step: int, steps: int, warmup: float = 0.0) -> float:
    """What the learning rate of one step is multiplied by (0..1).

    Args:
        kind: `linear` or `cosine`. step: optimizer steps made before this one. steps: of the whole training.
        warmup: share of the steps (0..0.5) in which the rate rises in a straight line.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = min((step - rising) / (steps - rising), 1.0)
    return 1.0 - done if kind == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0


def _rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The rates as the script has set them, to be compared; tensors by their version, which waits for no device."""
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    return [(id(rate), rate._version) if hasattr(rate, "_version") else rate for rate in rates]


class _Schedule(RateApplied):
    def __init__(self, optimizer: torch.optim.Optimizer, kind: str, steps: int, warmup: float) -> None:
        super().__init__(optimizer)
        self._kind, self._steps, self._warmup = kind, steps, warmup
        self._done = 0
        self._constant = _rates(optimizer)
        self.problem = ""
        rising = f" after {round(warmup * steps)} steps of warm-up" if round(warmup * steps) else ""
        self.note = f"{kind} decay to zero over {steps} steps{rising} ({type(optimizer).__name__})"

    def factor(self, optimizer: torch.optim.Optimizer) -> float:
        now = _rates(optimizer)
        if self._constant and now[: len(self._constant)] != self._constant:
            self._constant = []
            self.problem = f"the script changes the learning rate itself, at step {self._done}; its rate holds"
        if not self._constant:
            return 1.0
        if self._done == self._steps:
            self.problem = f"the script goes on after {self._steps} steps; its learning rate is zero since"
        self._done += 1
        return multiplier(self._kind, self._done - 1, self._steps, self._warmup)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def effect(self) -> NoEffect | None:
        return None if self._constant else NoEffect(self.problem)


class Schedule:
    """Warm-up and decay to zero of a constant learning rate."""

    card: ClassVar[Card] = Card(
        name="schedule",
        summary="Lets a constant learning rate fall to zero over the training.",
        source="Bergsma et al. 2025 (arXiv:2502.15938); Loshchilov and Hutter 2016 (arXiv:1608.03983)",
        sites=("optimizer_created", "step"),
        numerics=Numerics.CHANGES_TRAINING,
        switchable="process",
        targets=("optimizer",),
        details=(
            "Counts the steps of each optimizer from the start of the process. The rate is multiplied while the "
            "optimizer steps; what the script logs or saves is its own. Does nothing where the script has a scheduler."
        ),
        settings={
            "kind": SettingSpec("linear", "how the rate falls", choices=KINDS),
            "steps": SettingSpec(0, "optimizer steps of the whole training; 0: not known, does nothing", low=0),
            "warmup": SettingSpec(0.0, "share of the steps in which the rate rises first", low=0.0, high=0.5),
        },
        conflicts=("larger_batch",),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Other learning rates."""
        return Numerics.CHANGES_TRAINING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to one optimizer whose rate nothing changes, where the number of steps is known."""
        facts = seen.facts
        if len(facts.optimizers) != 1:
            return Verdict(False, f"{len(facts.optimizers)} optimizers: it is not known how many steps each will make")
        recipe, (optimizer,) = facts.recipe, facts.optimizers
        if sets_own_steps(optimizer.name):
            return Verdict(False, f"{optimizer.name} finds the size of its steps itself")
        if recipe is None or recipe.rate_changes is None:
            return Verdict(False, "whether the learning rate changes is not known")
        if recipe.schedulers:
            return Verdict(False, f"the script has a scheduler: {', '.join(recipe.schedulers)}")
        if recipe.rate_changes:
            return Verdict(False, "the script changes the learning rate itself")
        if "schedule" in (recipe.declared or ()):
            return Verdict(False, "the source speaks of a schedule, which may begin after the steps watched")
        if not facts.steps_total:
            return Verdict(False, "the number of steps of the whole training is not known")
        return Verdict(
            True,
            f"the learning rate was constant over the steps watched; {facts.steps_total} steps are planned",
            candidates=tuple({"kind": kind, "steps": facts.steps_total} for kind in KINDS),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Begins with an optimizer's first step."""
        if not isinstance(moment, OptimizerSeen):
            return None
        optimizer, steps = moment.optimizer, int(settings["steps"])
        if steps <= 0:
            return NoEffect("the number of steps is not known (setting `steps`)")
        if any("initial_lr" in group for group in optimizer.param_groups):
            return NoEffect("the script has a scheduler of its own")
        if sets_own_steps(type(optimizer).__name__):
            return NoEffect(f"{type(optimizer).__name__} finds the size of its steps itself")
        if not all("lr" in group for group in optimizer.param_groups):
            return NoEffect(f"{type(optimizer).__name__} has no learning rate")
        return _Schedule(optimizer, str(settings["kind"]), steps, float(settings["warmup"]))
