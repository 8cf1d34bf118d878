"""An exponential moving average of the weights, which evaluation uses.

Idea: the iterates of SGD move around what they converge to; their average lies nearer to it, at no further step.
How: after each optimizer step the average of its parameters, and of the floating buffers of the models that hold them,
is moved on. A model called in evaluation mode gets the average swapped in, in place; it is swapped out, bit for bit,
before the next call in training mode and before the next optimizer step. Training itself is not changed.
Limits: what the script saves between an evaluation and the next training step is the average, beside the state of an
optimizer that knows the other weights. Where a graph waits for its backward pass nothing is swapped. Weights that
something else than an optimizer step writes (a checkpoint that is loaded) begin a new average, and so does another
optimizer of the same weights; a write through `.data` is not seen. Where the training itself asks the model in
evaluation mode (pseudo labels, acting), the average answers. A model that is trained in evaluation mode from some later
step on has one gradient at the average.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Tarvainen and Valpola 2017,
"Mean teachers are better role models" (arXiv:1703.01780); `torch.optim.swa_utils`; the ramp of the decay:
`tf.train.ExponentialMovingAverage` (num_updates).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.measure.facts import parameters_of, tensors_in
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec

if TYPE_CHECKING:
    import torch

#: What acts in this process: averages go with optimizers, evaluation with models.
_averages: weakref.WeakSet[_Average] = weakref.WeakSet()
_models: weakref.WeakSet[_Model] = weakref.WeakSet()


def ramped(decay: float, averaged: int) -> float:
    """The decay for the next weights, when `averaged` have gone into the average: small at first, `decay` at last."""
    return min(decay, (1 + averaged) / (10 + averaged))


def obstacle(parameters: Iterable[torch.Tensor]) -> str:
    """Why these parameters are not averaged, or the empty string."""
    import torch

    parameters = list(parameters)
    if not parameters:
        return "no parameter is trained"
    for item in parameters:
        if type(item) not in (torch.Tensor, torch.nn.Parameter):
            return f"a parameter is a {type(item).__name__}"
        if item.dtype not in (torch.float32, torch.float64):
            return f"parameters are {item.dtype}, in which an average would stand still"
    return ""


class _Average(BaseApplied):
    """The average of one optimizer's parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._decay = decay
        self._on = True
        self._swapped = False
        self._used = 0
        self._averaged = 0
        self._written: list[int] = []
        self._tensors: list[torch.Tensor] = []
        self._why = "no evaluation was seen: no model was called in evaluation mode after a step"
        self._collect(optimizer)
        self._handle = optimizer.register_step_post_hook(self._after)
        _averages.add(self)

    def _collect(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [item for item in parameters_of(optimizer) if item.requires_grad]
        held = {id(item) for item in self._parameters}
        for other in list(_averages):
            # Weights have one average, that of the optimizer that came last; a model that is gone needs none.
            if other is not self and (other.shares(held) or not other.evaluated_by()):
                other.close()
        taken = {id(item) for other in _averages if other is not self for item in other._tensors}
        buffers: dict[int, torch.Tensor] = {}
        for model in _models:
            if model.shares(held):
                buffers.update(
                    (id(item), item) for item in model.buffers() if item.is_floating_point() and id(item) not in taken
                )
        self._tensors = [*self._parameters, *buffers.values()]
        self._means = [item.detach().clone() for item in self._tensors]
        self._held = held
        self._averaged = 0

    def evaluated_by(self) -> bool:
        """Whether a model with these parameters is alive."""
        return any(model.shares(self._held) and model.alive() for model in _models)

    def _versions(self) -> list[int]:
        return [item._version for item in self._tensors]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._on:
            return
        self.swap(False)
        trained = [item for item in parameters_of(optimizer) if item.requires_grad]
        if [id(item) for item in trained] != [id(item) for item in self._parameters]:
            self._collect(optimizer)
        self._begin_anew_if_written()

    def _begin_anew_if_written(self) -> None:
        # Of the parameters only: a call in training mode writes buffers.
        count = len(self._parameters)
        if self._averaged and self._versions()[:count] != self._written[:count]:
            self._averaged = 0
            self._why = "something else than the optimizer writes the weights between its steps"

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._on:
            return
        from torch import no_grad
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        current: Any = [item.detach() for item in self._tensors]
        if self._averaged:
            move = get_ema_multi_avg_fn(ramped(self._decay, self._averaged))  # type: ignore[no-untyped-call]
            move(self._means, current, self._averaged)
        else:
            with no_grad():
                for mean, item in zip(self._means, current, strict=True):
                    mean.copy_(item)
        self._averaged += 1
        self._written = self._versions()

    def swap(self, on: bool) -> bool:
        """Exchange weights and average; returns whether the average is in now."""
        if on == self._swapped or not (self._on or self._swapped):
            return self._swapped
        self._begin_anew_if_written()
        if on and not self._averaged:
            return False
        import torch

        with torch.inference_mode(False), torch.no_grad():
            for item, mean, version in zip(self._tensors, self._means, self._written, strict=True):
                kept = item.detach().clone()
                # What was written while the average was in (a checkpoint) is what the script wants.
                if on or item._version == version:
                    item.copy_(mean)
                mean.copy_(kept)
        self._swapped = on
        self._written = self._versions()
        self._used += on
        return on

    def state_dict(self) -> dict[str, Any]:
        """The average, in the order of the optimizer's parameters and then the buffers."""
        means = self._tensors if self._swapped else self._means
        return {"averaged": self._averaged, "average": [item.detach().clone() for item in means]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an average that `state_dict` returned; one of other weights is left alone, and begins anew."""
        from torch import no_grad

        self.swap(False)
        found = state["average"]
        if [item.shape for item in found] != [item.shape for item in self._means]:
            return
        with no_grad():
            for mean, item in zip(self._means, found, strict=True):
                mean.copy_(item)
        self._averaged, self._written = int(state["averaged"]), self._versions()

    def switch(self, on: bool) -> None:
        if not on:
            self.swap(False)
        elif not self._on:
            self._averaged = 0
        self._on = on

    def effect(self) -> NoEffect | None:
        return None if self._used else NoEffect(self._why)

    def shares(self, parameters: set[int]) -> bool:
        """Whether one of these parameters is averaged here."""
        return not self._held.isdisjoint(parameters)

    def close(self) -> None:
        self.switch(False)
        self._handle.remove()
        _averages.discard(self)
        self._parameters, self._tensors, self._means, self._written, self._held = [], [], [], [], set()


class _Model(BaseApplied):
    """Calls of one root module: which weights they see."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.note = f"evaluation of {type(module).__name__} uses an average of its weights (decay {decay:g})"
        self.pending = False
        """A call in training has left a graph whose backward pass has not begun."""
        self._module = weakref.ref(module)
        self._parameters = {id(item) for item in module.parameters()}
        self._trains_in_eval = False
        self.problem = ""
        self._used = 0
        _models.add(self)

    def shares(self, parameters: set[int]) -> bool:
        """Whether the model has one of these parameters."""
        return not self._parameters.isdisjoint(parameters)

    def alive(self) -> bool:
        return self._module() is not None

    def buffers(self) -> list[torch.Tensor]:
        module = self._module()
        return [] if module is None else list(module.buffers())

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        import torch

        gradients = torch.is_grad_enabled()
        training = module.training or (gradients and self._trains_in_eval)
        if training:
            self._swap(False)
        elif self.pending:
            self.problem = "an evaluation saw the weights, not their average, while a backward pass was awaited"
        elif self._swap(True):
            self._used += 1
        output = call(*args, **kwargs)
        if gradients:
            self._await_backward(output, training)
        return output

    def _swap(self, on: bool) -> bool:
        swapped = [item.swap(on) for item in list(_averages) if item.shares(self._parameters)]
        return any(swapped)

    def _await_backward(self, output: Any, training: bool) -> None:
        def begins(_: Any) -> None:
            self.pending = False
            self._trains_in_eval = self._trains_in_eval or not training

        for item in tensors_in(output):
            if item.requires_grad and not item.is_leaf:
                item.register_hook(begins)  # type: ignore[no-untyped-call]
                self.pending = self.pending or training

    def switch(self, on: bool) -> None:
        """While it is off, the averages swap nothing in."""

    def effect(self) -> NoEffect | None:
        return None if self._used else NoEffect(self.problem or "it was not evaluated with an average of its weights")

    def close(self) -> None:
        _models.discard(self)


class Ema:
    """Exponential moving average of the weights for evaluation."""

    card: ClassVar[Card] = Card(
        name="ema",
        summary="Keeps an exponential moving average of the weights and evaluates with it.",
        source="Polyak and Juditsky 1992; Tarvainen and Valpola 2017 (arXiv:1703.01780); torch.optim.swa_utils",
        sites=("model_created", "forward", "optimizer_created", "step"),
        numerics=Numerics.CHANGES_TRAINING,
        switchable="live",
        targets=("forward", "optimizer"),
        details=(
            "The training itself is not changed. From an evaluation to the next training step the model holds the "
            "average: what the script saves there is the average, and a training resumed from it goes on from there. "
            "Needs memory for one more copy of the weights."
        ),
        settings={"decay": SettingSpec(0.999, "share of the old average at each step, less at first", low=0.0, high=1)},
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Evaluation sees other weights."""
        return Numerics.CHANGES_TRAINING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to a trained model that is evaluated, as far as seen or declared."""
        facts = seen.facts
        if not any(model.trained for model in facts.models) or not facts.optimizers:
            return Verdict(False, "no model with an optimizer was seen")
        recipe = facts.recipe
        shown = recipe is None or recipe.declared is None or "validation" in recipe.declared or recipe.evaluations
        if not shown:
            return Verdict(False, "neither the steps watched nor the source show an evaluation that would use it")
        seen_it = "evaluation was seen" if recipe is not None and recipe.evaluations else "evaluation may come later"
        return Verdict(True, f"an average of the weights is often better than the last ones; {seen_it}")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Averages the parameters of an optimizer, and lets models use it where they are evaluated."""
        from torch.optim.swa_utils import AveragedModel

        decay = float(settings["decay"])
        if isinstance(moment, ModelSeen):
            if any(isinstance(item, AveragedModel) for item in moment.module.modules()):
                return NoEffect("the script averages the weights itself")
            trained = [item for item in moment.module.parameters() if item.requires_grad]
            if reason := obstacle(trained):
                return NoEffect(f"{type(moment.module).__name__}: {reason}")
            return _Model(moment.module, decay)
        if isinstance(moment, OptimizerSeen):
            if reason := obstacle(item for item in parameters_of(moment.optimizer) if item.requires_grad):
                return NoEffect(f"{type(moment.optimizer).__name__}: {reason}")
            return _Average(moment.optimizer, decay)
        return None
