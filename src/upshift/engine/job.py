"""`Job`: what is trained, declared in Python. The mathematics only; how it is executed is a plan's business.

    job = Job(model=build_model, train_data=train, eval_data=held_out, loss=F.cross_entropy,
              optimizer=partial(torch.optim.AdamW, lr=3e-4), metrics={"accuracy": accuracy},
              global_batch=512, epochs=10, target=Target("accuracy", 0.94), seed=0)

A job holds functions that build its parts: `model` is called to build, `optimizer` is called with the parameters. They
are called in every process that trains and are never pickled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Metrics whose names hold one of these are better when they are smaller.
_SMALLER = ("loss", "error", "perplexity", "mae", "mse", "rmse", "cer", "wer", "bits")


class Weighted(NamedTuple):
    """A loss that is a sum, and what it is to be divided by over the whole global batch (tokens, say).

    The mean over a batch whose samples count differently cannot be put together from means of its parts; from sums it
    can. `total` is a scalar with gradients, `count` a number or a scalar without.
    """

    total: torch.Tensor
    count: torch.Tensor | float  # type: ignore[assignment]


@dataclass(frozen=True)
class Target:
    """What a training is to reach: a metric of the job and its value; `mode` is `max`, `min` or empty (by name)."""

    metric: str
    value: float
    mode: str = ""

    def __post_init__(self) -> None:
        if self.mode not in ("", "max", "min"):
            raise UsageError(f"mode is 'max' or 'min', not {self.mode!r}.", remedy="Target('accuracy', 0.94, 'max')")
        if not math.isfinite(self.value):
            raise UsageError(f"a target of {self.value} cannot be reached.", remedy="Name a finite value.")

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return higher_is_better(self.metric) if not self.mode else self.mode == "max"

    def reached(self, value: float) -> bool:
        """Whether `value` reaches it; a value that is not a number does not."""
        return value >= self.value if self.higher else value <= self.value


def higher_is_better(metric: str) -> bool:
    """By the name of a metric; losses, errors and perplexities are better when they are smaller."""
    return not any(part in metric.lower() for part in _SMALLER)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training.

    Args:
        model: builds the model; called once per process, after the seed was set.
        train_data: a dataset (map-style or iterable), a tuple or dict of tensors of equal length, or a function that
            returns one of these.
        loss: `loss(output, target)`, the mean over the samples, or a `Weighted` sum. With dictionary batches
            `loss(output, batch)`. None: the output has a `.loss` or `["loss"]`.
        optimizer: is called with the parameters (or parameter groups) and returns an optimizer.
        global_batch: samples of one update, over all ranks and micro-batches.
        epochs, steps: how long; one of them.
        eval_data: as `train_data`; evaluated after each epoch, or every `eval_every` steps.
        schedule: learning rate: a schedule of `upshift.engine.schedules`, or a function of the optimizer that returns a
            torch scheduler, which is stepped after every update.
        metrics: name -> function `(output, target)` that returns the mean over the batch or `(sum, count)`, or a
            function without arguments that returns a torchmetrics metric.
        target: the metric value to be reached; with `stop_at_target` training ends there.
        forward: `forward(model, batch)`, where the model is not simply called with the batch without its last part.
        collate: puts samples together, as in torch's DataLoader.
        shuffle: a new order every epoch, a function of seed and epoch.
        draws: whether `__getitem__` draws random numbers (augmentation): each sample then gets a seed of its own, a
            function of seed, epoch and index.
        clip: the largest norm of the gradient (all parameters together); None for none.
        average: weights averaged over the updates (`upshift.engine.averages`), which are evaluated and exported.
        parameters: `parameters(model)` returns parameter groups; None: all that require gradients.
        stop_early: `upshift.engine.stopping.EarlyStop`; None for none.
        start: weights to start from: `.safetensors`, `.pt` (loaded without pickle) or a folder of torch's DCP.
        seed: of weights, order, augmentation and dropout.
    """

    model: Callable[[], torch.nn.Module]
    train_data: Any
    optimizer: Callable[[Any], torch.optim.Optimizer]
    global_batch: int
    loss: Callable[[Any, Any], Any] | None = None
    epochs: int | None = None
    steps: int | None = None
    eval_data: Any = None
    eval_every: int | None = None
    eval_batch: int | None = None
    schedule: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    stop_at_target: bool = False
    forward: Callable[[torch.nn.Module, Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    shuffle: bool = True
    draws: bool = True
    clip: float | None = None
    average: Any = None
    parameters: Callable[[torch.nn.Module], Any] | None = None
    stop_early: Any = None
    start: str = ""
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for part in ("model", "optimizer"):
            if not callable(getattr(self, part)):
                raise UsageError(
                    f"{part} is to be a function that builds it, not {_kind(getattr(self, part))}.",
                    remedy=f"Wrap it: {_REMEDIES[part]}.",
                )
        if _is_module(getattr(self, "model", None)):
            raise UsageError(
                "model is a module that was already built; every process builds its own.",
                remedy=f"Hand over the function that builds it: {_REMEDIES['model']}.",
            )
        if self.loss is not None and not callable(self.loss):
            raise UsageError(f"loss is not callable: {_kind(self.loss)}.", remedy="loss=F.cross_entropy")
        if not _whole(self.global_batch) or self.global_batch < 1:
            raise UsageError(f"global_batch is {self.global_batch!r}.", remedy="Name a whole number of samples.")
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(
                "how long to train is not said." if self.epochs is None else "both epochs and steps are given.",
                remedy="Give one of them: epochs=10 or steps=5000.",
            )
        for part in ("epochs", "steps", "eval_every", "eval_batch"):
            value = getattr(self, part)
            if value is not None and (not _whole(value) or value < 1):
                raise UsageError(f"{part} is {value!r}.", remedy=f"{part} is a whole number, at least 1.")
        if self.clip is not None and not (isinstance(self.clip, (int, float)) and self.clip > 0):
            raise UsageError(f"clip is {self.clip!r}.", remedy="clip is the largest norm of the gradient, above 0.")
        if not _whole(self.seed):
            raise UsageError(f"seed is {self.seed!r}.", remedy="seed is a whole number.")
        if self.target is not None:
            self._check_target(self.target)
        needs = "metrics" if self.metrics else "eval_every" if self.eval_every is not None else ""
        if needs and self.eval_data is None:
            raise UsageError(
                f"{needs} is given but nothing to evaluate on.", remedy=f"Give eval_data, or leave {needs} out."
            )

    def _check_target(self, target: Target) -> None:
        known = [*self.metrics, "loss"]
        if target.metric not in known:
            raise UsageError(
                f"the target names {target.metric!r}, which is no metric of the job.",
                remedy=f"It has: {', '.join(known)}. Add it to metrics, or name one of these.",
            )
        if self.eval_data is None:
            raise UsageError(
                "there is a target but nothing to evaluate on.", remedy="Give eval_data, or leave the target out."
            )

    def set(self, **changes: Any) -> Job:
        """This job with other values; `epochs` takes the place of `steps` and the reverse.

        Raises:
            UsageError: there is no such field, or the value does not fit.
        """
        known = {item.name for item in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                raise UsageError(f"a Job has no {key!r}.", remedy=f"It has: {', '.join(sorted(known))}.")
        if "epochs" in changes and "steps" not in changes:
            changes["steps"] = None
        if "steps" in changes and "epochs" not in changes:
            changes["epochs"] = None
        return dataclasses.replace(self, **changes)


_REMEDIES = {"model": "model=lambda: Net(width=64)", "optimizer": "optimizer=partial(torch.optim.AdamW, lr=3e-4)"}


def _kind(value: object) -> str:
    return type(value).__name__


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_module(value: object) -> bool:
    # By name: this file does without torch.
    return any(item.__module__ == "torch.nn.modules.module" for item in type(value).__mro__)
