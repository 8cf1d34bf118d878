"""A larger batch, with the learning rate that goes with it.

Idea: a step over k times the samples has k times less noise in its gradient and bears a larger learning rate, so that
an epoch needs k times fewer steps. Small steps leave much of a machine idle.
Rules for the rate: times k for SGD (Goyal et al. 2017), times the square root of k for Adam and its kind (Malladi et
al. 2022). Both hold up to a batch that depends on the task and is not known beforehand: whole runs decide.
Limits: when a loader is built nothing says what it is for. One that draws its samples in random order is taken to be
for training; found to be iterated without gradients, it gets its own batch size back. A loader in fixed order, with a
batch sampler of its own or over a stream is left alone. A script that counts its steps beforehand without asking the
loader, or keeps state of one batch's shape, is not served. The learning rate changes only where a batch has.

Sources: Goyal et al. 2017, "Accurate, Large Minibatch SGD" (arXiv:1706.02677); Krizhevsky 2014, "One weird trick for
parallelizing convolutional neural networks" (arXiv:1404.5997); Malladi et al. 2022, "On the SDEs and Scaling Rules for
Adaptive Gradient Algorithms" (arXiv:2205.10287); McCandlish et al. 2018 (arXiv:1812.06162) on where it ends.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.records.recipe import sets_own_steps
from upshift.sites import Applied, Card, LoaderArgs, LoaderReady, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec
from upshift.sites.rate import RateApplied

if TYPE_CHECKING:
    import torch

FACTORS = (2, 4, 8)
SCALINGS = ("linear", "sqrt", "none")

#: Batches an epoch must have left.
LEAST_BATCHES = 8

#: Optimizers of the square root rule, by a part of their names: those that divide by a running root of squares.
_ADAPTIVE = ("adam", "rmsprop", "adagrad", "lamb")
_PLAIN = ("SGD", "ASGD", "LARS")

#: Loaders of this process that have larger batches now: the rate must not change without them.
_enlarged: weakref.WeakSet[_Batches] = weakref.WeakSet()


def rate_factor(factor: int, scaling: str) -> float:
    """What the learning rate is multiplied by for a batch `factor` times as large.

    Raises:
        KeyError: no such scaling.
    """
    return {"linear": float(factor), "sqrt": math.sqrt(factor), "none": 1.0}[scaling]


def rule(optimizer: str) -> str:
    """The scaling that fits an optimizer, by the name of its class; `none` where no rule is known for it."""
    if sets_own_steps(optimizer):
        return "none"
    if optimizer in _PLAIN:
        return "linear"
    return "sqrt" if any(part in optimizer.lower() for part in _ADAPTIVE) else "none"


def obstacle(args: dict[str, Any], factor: int) -> str:
    """Why a loader with these arguments of `DataLoader` keeps its batch size, or the empty string."""
    from torch.utils.data import IterableDataset, SequentialSampler

    if isinstance(args.get("dataset"), IterableDataset):
        return "its dataset is a stream"
    if args.get("batch_sampler") is not None:
        return "it has a batch sampler of its own"
    size, sampler = args.get("batch_size", 1), args.get("sampler")
    if type(size) is not int or size < 1:
        return f"it has no batch size (batch_size={size!r})"
    if not args.get("shuffle") and (sampler is None or isinstance(sampler, SequentialSampler)):
        return "it reads in fixed order, as evaluation does, and nothing else tells what it is for"
    try:
        samples = len(args["dataset"] if sampler is None else sampler)
    except (TypeError, NotImplementedError):
        return "how many samples an epoch has is not known"
    left = samples // (size * factor) if args.get("drop_last") else -(-samples // (size * factor))
    if left < LEAST_BATCHES:
        return f"{left} batches an epoch would be left, fewer than {LEAST_BATCHES}"
    return ""


class _Size(int):
    """A batch size that knows what it came from, until its loader is seen; to anyone else a plain number."""

    batches: _Batches

    def __reduce__(self) -> Any:
        return int, (int(self),)


class _Batches(BaseApplied):
    """One loader with larger batches."""

    def __init__(self, name: str, before: int, factor: int, rate: float) -> None:
        self.before = before
        self.size = _Size(before * factor)
        self.size.batches = self
        self._loader: weakref.ref[Any] | None = None
        self._why = ""
        self.note = f"{name}: batch_size {before} -> {before * factor}, learning rates x {rate:.4g}"
        _enlarged.add(self)

    def meet(self, loader: Any) -> None:
        """The loader is about to be iterated for the first time: now it is seen whether for training."""
        import torch

        self._loader = weakref.ref(loader)
        if torch.is_grad_enabled():
            _set_size(loader, int(self.size))
        else:
            self.close()
            self._why = "a loader in random order is iterated without gradients, so it is not for training"

    def effect(self) -> NoEffect | None:
        return NoEffect(self._why) if self._why else None

    def close(self) -> None:
        """Its own size again, from the next epoch on."""
        _enlarged.discard(self)
        loader = self._loader() if self._loader is not None else None
        if loader is not None:
            _set_size(loader, self.before)


def _set_size(loader: Any, size: int) -> None:
    # A loader refuses the assignment; its batch sampler is the one that counts.
    object.__setattr__(loader, "batch_size", size)
    loader.batch_sampler.batch_size = size


class _Rate(RateApplied):
    def __init__(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        super().__init__(optimizer)
        self._factor = factor

    def factor(self, optimizer: torch.optim.Optimizer) -> float:
        return self._factor if _enlarged else 1.0

    def effect(self) -> NoEffect | None:
        return None if _enlarged else NoEffect("no loader has larger batches")


class LargerBatch:
    """Larger training batches, and a learning rate scaled with them."""

    card: ClassVar[Card] = Card(
        name="larger_batch",
        summary="Trains with larger batches and a learning rate scaled to them, in fewer steps.",
        source="Goyal et al. 2017 (arXiv:1706.02677); Malladi et al. 2022 (arXiv:2205.10287)",
        sites=("loader_args", "loader_ready", "optimizer_created", "step"),
        numerics=Numerics.CHANGES_TRAINING,
        switchable="process",
        targets=("data", "forward", "backward", "optimizer"),
        details=(
            "Acts on map-style loaders that draw in random order and keep at least 8 batches an epoch. The rate is "
            "scaled while the optimizer steps; what the script logs or saves is its own. Activations need more memory."
        ),
        settings={
            "factor": SettingSpec(2, "times as many samples a batch", choices=FACTORS),
            "scaling": SettingSpec(
                "linear", "learning rate times the factor (SGD), its square root (Adam), or as it is", choices=SCALINGS
            ),
        },
        conflicts=("schedule",),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Other batches, fewer steps."""
        return Numerics.CHANGES_TRAINING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to training from a map-style loader with batches enough; candidates as far as batches are left."""
        loaders = [item for item in seen.facts.loaders if item.training and not item.iterable]
        if not loaders:
            return Verdict(False, "no training DataLoader over a map-style dataset was seen")
        known = [(item.samples, item.batch_size) for item in loaders if item.samples and item.batch_size]
        if not known:
            return Verdict(False, "the batch size or the number of samples of the training loader is not known")
        rules = {rule(item.name) for item in seen.facts.optimizers}
        if len(rules) != 1:
            names = ", ".join(item.name for item in seen.facts.optimizers) or "no optimizer seen"
            return Verdict(False, f"no one rule says how the learning rate goes with the batch: {names}")
        (scaling,) = rules
        samples, size = max(known)
        fitting = [factor for factor in FACTORS if samples // (size * factor) >= LEAST_BATCHES]
        if not fitting:
            return Verdict(False, f"{samples} samples in batches of {size}: fewer than {LEAST_BATCHES} would be left")
        how = {"linear": "in proportion", "sqrt": "by its square root", "none": "not at all (no rule is known)"}
        return Verdict(
            True,
            f"{samples // size} batches of {size} an epoch; the learning rate of {seen.facts.optimizers[0].name} "
            f"would grow with the batch {how[scaling]}",
            candidates=tuple({"factor": factor, "scaling": scaling} for factor in fitting),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Enlarges a loader being built; scales the rates of optimizers once one is."""
        factor = int(settings["factor"])
        scale = rate_factor(factor, str(settings["scaling"]))
        if isinstance(moment, LoaderArgs):
            name = type(moment.args.get("dataset")).__name__
            if reason := obstacle(moment.args, factor):
                return NoEffect(f"the loader of {name} keeps its batches: {reason}")
            applied = _Batches(name, int(moment.args.get("batch_size", 1)), factor, scale)
            moment.args["batch_size"] = applied.size
            return applied
        if isinstance(moment, LoaderReady):
            size = moment.loader.batch_size
            if isinstance(size, _Size):
                size.batches.meet(moment.loader)
            return None
        if not isinstance(moment, OptimizerSeen):
            return None
        if not _enlarged:
            return NoEffect("no loader has larger batches, so the learning rate stays")
        if scale == 1.0:
            return None
        if not any("lr" in group for group in moment.optimizer.param_groups):
            return NoEffect(f"{type(moment.optimizer).__name__} has no learning rate")
        return _Rate(moment.optimizer, scale)
