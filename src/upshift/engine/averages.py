"""An average of the weights, kept beside the training and used for evaluation.

Idea: the iterates of a stochastic method move around what they converge to; their average lies nearer to it, at no
further step. `Ema` forgets exponentially and is good at any time; `Swa` weighs all weights of the last part of a
training alike. Training itself is not changed: the average is swapped in, in place, and out again bit for bit.
Limits: memory for one copy of the trained weights (float32 where these are 16 bits wide, since an average in 16 bits
stands still), and for a second one while it is swapped in. Frozen parameters are not averaged. Buffers (statistics of
batch normalisation) are those of the model by default, which fit an EMA that follows closely; after SWA they are
collected anew with `refresh_statistics`.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Tarvainen and Valpola 2017
(arXiv:1703.01780); Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima" (arXiv:1803.05407);
`torch.optim.swa_utils`; the warm-up of the decay: `tf.train.ExponentialMovingAverage` (num_updates).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from upshift.engine.lengths import Length, Span
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

Buffers = Literal["copied", "averaged"]


@dataclass(frozen=True)
class Ema:
    """Exponential moving average: average <- d * average + (1 - d) * weights.

    Args:
        decay: d, the share of the old average (0 <= d < 1); it remembers about 1 / (1 - d) updates.
        warm_up: let d rise as min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are forgotten.
        start: when averaging begins. every: length between two updates.
        buffers: `copied`, evaluation uses the model's own; `averaged`, floating buffers are averaged like weights.
    """

    decay: float = 0.999
    warm_up: bool = True
    start: Length = 0
    every: Length = 1
    buffers: Buffers = "copied"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UsageError(f"The decay of the average is {self.decay!r}.", remedy="Give 0 <= decay < 1, say 0.999.")

    def share(self, averaged: int) -> float:
        """The weight of the new weights (0..1), when `averaged` have gone into the average."""
        if not averaged:
            return 1.0
        return 1 - (min(self.decay, (1 + averaged) / (10 + averaged)) if self.warm_up else self.decay)


@dataclass(frozen=True)
class Swa:
    """Stochastic weight averaging: the plain mean of the weights at equal distances, late in the training.

    Args:
        start: when averaging begins. every: length between two updates, as a rule one epoch.
        buffers: as for `Ema`; with batch normalisation, `refresh_statistics` before the average is evaluated.
    """

    start: Length = "75 %"
    every: Length = "1 epoch"
    buffers: Buffers = "copied"

    def share(self, averaged: int) -> float:
        """The weight of the new weights (0..1), when `averaged` have gone into the average."""
        return 1 / (averaged + 1)


class Average:
    """The running average of one model.

    It holds on to the parameters as they are now: make it after the model is on its device (and sharded).

    Args:
        model: the plain module. rule: `Ema` or `Swa`. span: what lengths in the rule are converted with; without it
            they have to be in steps.

    Raises:
        UsageError: nothing is trained, or a length cannot be converted.
    """

    def __init__(self, model: torch.nn.Module, rule: Ema | Swa, span: Span | None = None) -> None:
        span = span or Span(None)
        self.rule = rule
        self.averaged = 0
        """How many states of the weights have gone into the average."""
        self.step = 0
        """Optimizer steps made, counted by `update`."""
        self._first = max(1, span.count(rule.start, "start of the average"))
        self._every = max(1, span.count(rule.every, "every of the average"))
        self._model = model
        named: dict[str, torch.Tensor] = {
            name: item for name, item in model.named_parameters() if item.requires_grad and _averages(item)
        }
        if not named:
            raise UsageError("No parameter is trained, so there is nothing to average.", remedy="Leave average out.")
        if rule.buffers == "averaged":
            named.update((name, item) for name, item in model.named_buffers() if _averages(item))
        self._names = list(named)
        self._tensors: list[torch.Tensor] = list(named.values())
        self._means = [_wide(item.detach()).clone() for item in self._tensors]
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def swapped_in(self) -> bool:
        """Whether the model holds the average now."""
        return self._kept is not None

    def due(self, step: int) -> bool:
        """Whether the weights after `step` optimizer steps (counted from 1) go into the average."""
        return step >= self._first and (step - self._first) % self._every == 0

    def update(self) -> bool:
        """After every optimizer step: take in the weights, if they are due; returns whether they were.

        Raises:
            RuntimeError: the average is swapped in.
        """
        self.step += 1
        if not self.due(self.step):
            return False
        if self._kept is not None:
            raise RuntimeError("the average is swapped in: swap it out before the next optimizer step")
        import torch

        with torch.no_grad():
            now: list[torch.Tensor] = [_wide(item) for item in self._tensors]
            if self.averaged:
                torch._foreach_lerp_(self._means, now, self.rule.share(self.averaged))
            else:
                for mean, item in zip(self._means, now, strict=True):
                    mean.copy_(item)
        self.averaged += 1
        return True

    def swap_in(self) -> bool:
        """Put the average into the model; returns False, and changes nothing, while there is none yet."""
        if not self.averaged or self._kept is not None:
            return self._kept is not None
        import torch

        with torch.inference_mode(False), torch.no_grad():
            written = {id(item): item for item in (*self._tensors, *self._model.buffers())}
            self._kept = [(item, item.detach().clone()) for item in written.values()]
            for item, mean in zip(self._tensors, self._means, strict=True):
                item.copy_(mean)
        return True

    def swap_out(self) -> None:
        """Give the model its weights and buffers back, bit for bit; what was written meanwhile is lost."""
        if self._kept is None:
            return
        import torch

        with torch.inference_mode(False), torch.no_grad():
            for item, kept in self._kept:
                item.copy_(kept)
        self._kept = None

    def originals(self) -> dict[int, torch.Tensor]:
        """While the average is swapped in: address of a tensor of the model -> what it held before."""
        return {item.data_ptr(): kept for item, kept in self._kept or () if item.numel()}

    @contextmanager
    def swapped(self) -> Iterator[bool]:
        """The model holds the average inside the block; the value says whether there was one."""
        present = self.swap_in()
        try:
            yield present
        finally:
            self.swap_out()

    def weights(self) -> dict[str, Any]:
        """The averaged model as a state dict with the model's own names and dtypes, tied weights tied.

        What is not averaged (frozen parameters, buffers) is a copy of the model's.
        """
        import torch

        means = {id(item): mean for item, mean in zip(self._tensors, self._means, strict=True)}
        copies: dict[int, torch.Tensor] = {}
        result: dict[str, Any] = {}
        for name, item in self._model.state_dict(keep_vars=True).items():
            if isinstance(item, torch.Tensor):
                if id(item) not in copies:
                    copies[id(item)] = means.get(id(item), item).detach().to(item.dtype, copy=True)
                result[name] = copies[id(item)]
            else:
                result[name] = item
        return result

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the tensors are the average's own, to be copied before the next update."""
        return {"step": self.step, "averaged": self.averaged, "means": dict(zip(self._names, self._means, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average.

        Raises:
            UsageError: it is the average of other weights.
        """
        import torch

        means: Mapping[str, torch.Tensor] = state["means"]
        own = {name: tuple(mean.shape) for name, mean in zip(self._names, self._means, strict=True)}
        saved = {name: tuple(mean.shape) for name, mean in means.items()}
        if own != saved:
            differ = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
            raise UsageError(
                f"The saved average is of another model: {', '.join(differ[:3])}{' …' if differ[3:] else ''} differ.",
                remedy="Resume with the model and the average the run began with, or begin a new run.",
            )
        self.swap_out()
        with torch.no_grad():
            for name, mean in zip(self._names, self._means, strict=True):
                mean.copy_(means[name])
        self.step, self.averaged = int(state["step"]), int(state["averaged"])


def refresh_statistics(
    model: torch.nn.Module, batches: Iterable[Any], forward: Callable[[torch.nn.Module, Any], Any] | None = None
) -> int:
    """Collect the statistics of batch normalisation anew, for weights that were never trained with: an average.

    Args:
        model: the module; its modes and momenta are as before afterwards.
        batches: what is passed through, on the model's device; each batch counts alike, whatever its size.
        forward: how a batch goes through the model; `model(batch)` unless given.

    Returns:
        The number of layers with statistics; for none, nothing is passed through.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = [item for item in model.modules() if isinstance(item, _BatchNorm) and item.track_running_stats]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    modes = [(item, item.training) for item in model.modules()]
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over all batches
        with torch.no_grad():
            for batch in batches:
                if forward is None:
                    model(batch)
                else:
                    forward(model, batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for item, mode in modes:
            item.training = mode
    return len(layers)


def _averages(item: torch.Tensor) -> bool:
    return item.is_floating_point() or item.is_complex()


def _wide(item: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that an average can move in."""
    import torch

    return item.float() if item.dtype in (torch.float16, torch.bfloat16) else item
