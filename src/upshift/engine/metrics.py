"""Metrics of a job, collected over one evaluation and over all ranks.

A metric is declared as one of
- a name: `"accuracy"` or `"perplexity"`;
- a function `f(output, target)` that returns a pair (sum, count), a tensor with one value per sample, shape (n,) or
  (n, ...), or a scalar mean over the samples, which is then weighed by their number;
- `Mean(f, then=...)`, the same with a last step: `Mean(squared_error, then=math.sqrt)`;
- a torchmetrics object, class or builder (`partial(MulticlassF1Score, num_classes=10)`), which brings its own state
  and its own exchange between ranks.
`target` is what the loss gets: the last item of a tuple, or the whole batch where it is a dict.

Sums are kept in float64 on the device (float32 where it has none), so that nothing waits for the device before the end;
over ranks the sums and counts are added, not the means, so that unequal shares of the data do not matter.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from upshift._optional import require
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

_FORMS = 'Declare a name ("accuracy", "perplexity"), f(output, target) -> (sum, count), or a torchmetrics builder.'


class Ranks(Protocol):
    """The processes that evaluate together."""

    def sum(self, values: list[float]) -> list[float]:
        """Each value added over the ranks; all of them call, and all of them get the sums."""


@dataclass(frozen=True)
class Mean:
    """A metric that is a quotient of two sums, and what is made of it at last.

    Args:
        of: f(output, target) -> (sum, count), or values per sample, or their mean.
        then: what is applied to the mean over the whole evaluation, such as `math.exp`.
    """

    of: Callable[[Any, Any], Any]
    then: Callable[[float], float] | None = None

    def result(self, total: float, count: float) -> float:
        """The metric; NaN where nothing was counted, infinity where `then` overflows."""
        if not count:
            return math.nan
        try:
            return self.then(total / count) if self.then else total / count
        except OverflowError:
            return math.inf


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returns: a tensor, `.logits`, `["logits"]`, or the first item of a tuple.

    Raises:
        UsageError: there is none of these.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, torch.Tensor):
        return found
    raise UsageError(
        f"The model returns a {type(output).__name__}, in which no logits were found.",
        remedy="Declare the metric as a function of your own: f(output, target) -> (sum, count).",
    )


def labels_of(target: Any) -> torch.Tensor:
    """The labels in a target: a tensor, or the item `labels`, `label`, `targets`, `target` or `y` of a dict.

    Raises:
        UsageError: there is none of these.
    """
    import torch

    if isinstance(target, torch.Tensor):
        return target
    if isinstance(target, Mapping):
        for name in ("labels", "label", "targets", "target", "y"):
            if isinstance(target.get(name), torch.Tensor):
                found: torch.Tensor = target[name]
                return found
    raise UsageError(
        f"The target is a {type(target).__name__}, in which no labels were found.",
        remedy="Declare the metric as a function of your own: f(output, target) -> (sum, count).",
    )


#: Labels that `torch.nn.functional.cross_entropy` leaves out by default.
IGNORED = -100


def accuracy(output: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right answers and answers.

    Args:
        output: logits (n, C), (n, C, d...) as for `cross_entropy`, (n, T, C) as of language models, or (n,), (n, 1)
            of a binary classifier, whose answer is yes above zero.
        target: classes (n,), (n, d...), (n, T), of which -100 is left out; or probabilities with the shape of output,
            of which the largest counts.
    """
    logits, labels = logits_of(output), labels_of(target)
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1):
        return _binary(logits, labels)
    axis = _class_axis(logits, labels)
    if labels.shape == logits.shape and labels.is_floating_point():
        labels = labels.argmax(axis)
    counted = labels != IGNORED
    hits = (logits.argmax(axis) == labels) & counted
    return hits.sum(), counted.sum()


def negative_log_likelihood(output: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log p(label) in nats, and the number of labels (tokens); shapes as for `accuracy`, classes only."""
    import torch

    logits, labels = logits_of(output), labels_of(target)
    axis = _class_axis(logits, labels)
    rows = logits.movedim(axis, -1).flatten(0, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    losses = torch.nn.functional.cross_entropy(rows, labels.flatten(), reduction="none", ignore_index=IGNORED)
    return _wide(losses).sum(), (labels != IGNORED).sum()


#: exp of the mean negative log-likelihood per token. The target is aligned with the output: shifted by one already.
PERPLEXITY = Mean(negative_log_likelihood, then=math.exp)

BUILT_IN: dict[str, Mean] = {"accuracy": Mean(accuracy), "perplexity": PERPLEXITY}


class Metrics:
    """All metrics of a job over one evaluation; `reset` before the next.

    Args:
        declared: the job's metrics by name, see the head of this file; objects in it are cloned, never changed.
        ranks: who evaluates together; None for one process.

    Raises:
        UsageError: something that is no metric. MissingExtraError: torchmetrics is asked for and not installed.
    """

    def __init__(self, declared: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        self._means: dict[str, Mean] = {}
        self._objects: dict[str, Any] = {}
        for name, item in declared.items():
            made = _made(name, item)
            if isinstance(made, Mean):
                self._means[name] = made
            else:
                self._objects[name] = made
        self._names = list(declared)
        self._sums: dict[str, tuple[Any, Any]] = {}

    def reset(self) -> None:
        """Forget what was seen."""
        self._sums = {}
        for item in self._objects.values():
            item.reset()

    def update(self, output: Any, target: Any, samples: int) -> None:
        """Take in one (micro-)batch.

        Args:
            output: what the model returned. target: what the loss got.
            samples: how many samples count; 0 leaves the batch out (a rank without a share repeats a sample).

        Raises:
            UsageError: a metric returned something that cannot be averaged.
        """
        if not samples:
            return
        import torch

        with torch.no_grad():
            for name, mean in self._means.items():
                total, count = _pair(name, mean.of(output, target), samples)
                old = self._sums.get(name)
                self._sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)
            for item in self._objects.values():
                logits, labels = logits_of(output), labels_of(target)
                # An exchange per batch is not wanted; torchmetrics exchanges states in compute().
                item.to(logits.device).update(logits, labels)

    def compute(self) -> dict[str, float]:
        """The values over everything that all ranks have seen, in the order declared; every rank has to call.

        A torchmetrics object that returns several named values gives `name/key` for each.

        Raises:
            UsageError: a metric gave more than one number without names.
        """
        flat: list[float] = []
        for name in self._means:
            flat.extend(float(item) for item in self._sums.get(name, (0.0, 0.0)))
        if self._ranks is not None and flat:
            flat = self._ranks.sum(flat)
        values = {name: mean.result(*flat[2 * at : 2 * at + 2]) for at, (name, mean) in enumerate(self._means.items())}
        result: dict[str, float] = {}
        for name in self._names:
            if name in values:
                result[name] = values[name]
            else:
                result.update(_numbers(name, self._objects[name].compute()))
        return result


def _made(name: str, item: Any) -> Any:
    """The metric that was declared: a `Mean`, or a torchmetrics object of our own."""
    if isinstance(item, Mean):
        return item
    if isinstance(item, str):
        if item not in BUILT_IN:
            known = ", ".join(sorted(BUILT_IN))
            raise UsageError(f"metrics[{name!r}] = {item!r} is not a built-in metric ({known}).", remedy=_FORMS)
        return BUILT_IN[item]
    if _is_object(item):
        return item.clone()
    if not callable(item):
        raise UsageError(f"metrics[{name!r}] is a {type(item).__name__}, not a metric.", remedy=_FORMS)
    if not _is_builder(name, item):
        return Mean(item)
    built = item()
    if not _is_object(built):
        require("torchmetrics", extra="metrics", why=f"metrics[{name!r}]")
        raise UsageError(f"metrics[{name!r}] builds a {type(built).__name__}, not a metric.", remedy=_FORMS)
    return built


def _is_object(item: Any) -> bool:
    """Whether it has the protocol of torchmetrics: `update`, `compute`, `reset` on a module."""
    import torch

    return isinstance(item, torch.nn.Module) and all(hasattr(item, part) for part in ("update", "compute", "reset"))


def _is_builder(name: str, item: Callable[..., Any]) -> bool:
    """Whether it is called without arguments and makes an object; a function of two is a metric."""
    if isinstance(item, type) or isinstance(getattr(item, "func", None), type):
        return True  # a class, or a partial of one, which two more arguments would fit as well
    try:
        signature = inspect.signature(item)
    except ValueError:  # a builtin without a signature
        return False
    if _accepts(signature, 2):
        return False
    if _accepts(signature, 0):
        return True
    raise UsageError(f"metrics[{name!r}] takes neither (output, target) nor nothing: {signature}.", remedy=_FORMS)


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _pair(name: str, value: Any, samples: int) -> tuple[Any, Any]:
    """What a metric returned as (sum, count), tensors in a wide dtype."""
    import torch

    if isinstance(value, tuple) and len(value) == 2:
        return _wide(value[0]), _wide(value[1])
    if isinstance(value, bool | int | float):
        return float(value) * samples, float(samples)
    if isinstance(value, torch.Tensor) and value.numel():
        if value.ndim == 0:
            return _wide(value) * samples, float(samples)
        if value.shape[0] == samples:
            return _wide(value).reshape(samples, -1).mean(1).sum(), float(samples)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    raise UsageError(
        f"metrics[{name!r}] returned a {type(value).__name__}{shape} for {samples} samples.",
        remedy="Return (sum, count), one value per sample, or one mean.",
    )


def _wide(value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return float(value)
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Values of a torchmetrics object as floats, nested names joined by a slash."""
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for key, item in value.items():
            found.update(_numbers(f"{name}/{key}", item))
        return found
    if getattr(value, "numel", lambda: 1)() != 1:
        raise UsageError(
            f"metrics[{name!r}] gives {value.numel()} values, not one.",
            remedy='Ask for one number, such as average="macro".',
        )
    return {name: float(value)}


def _binary(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if labels.numel() != logits.numel():
        raise _mismatch(logits, labels)
    hits = (logits.flatten() > 0) == (labels.flatten() > 0.5)
    return hits.sum(), torch.tensor(labels.numel(), device=logits.device)


def _class_axis(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """Where the classes are: axis 1 as `cross_entropy` has it, else the last.

    Raises:
        UsageError: neither fits, or both do (as many classes as positions).
    """
    if labels.shape == logits.shape[:-1] == logits.shape[:1] + logits.shape[2:] and logits.ndim > 2:
        raise UsageError(
            f"Logits of shape {tuple(logits.shape)} do not say which axis holds the classes.",
            remedy="Declare the metric as a function of your own: f(output, target) -> (sum, count).",
        )
    if labels.shape == logits.shape or labels.shape == logits.shape[:1] + logits.shape[2:]:
        return 1
    if labels.shape == logits.shape[:-1]:
        return logits.ndim - 1
    raise _mismatch(logits, labels)


def _mismatch(logits: torch.Tensor, labels: torch.Tensor) -> UsageError:
    return UsageError(
        f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not fit.",
        remedy="Declare the metric as a function of your own: f(output, target) -> (sum, count).",
    )
