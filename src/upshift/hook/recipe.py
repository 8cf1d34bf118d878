"""How the training is set up: learning rates, modes and gradients, looked at between the steps of a diagnosis.

Looked at where it costs the steps nothing: rates and modes after a step has been booked, gradients right after an
optimizer's step until each parameter has had one that is not zero, which is mostly the first step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.hook.scores import Evaluations
from upshift.measure.declared import declared
from upshift.measure.facts import decayed_vectors, elements, learning_rates, mode_layers, parameters_of
from upshift.measure.steps import StepRecord, evaluates_apart
from upshift.records.recipe import LeftOut, ModelMode, RecipeFacts

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Values of the loss curve that are kept.
CURVE = 200
NAMES = 5
#: Gradients that are not None are read at each of the first steps of an optimizer, then at powers of two.
READ_FIRST = 8


class _Pending:
    """The parameters of one optimizer that have not had a gradient other than zero."""

    def __init__(self, optimizer: Any) -> None:
        trained = [item for item in parameters_of(optimizer) if item.requires_grad]
        self.optimizer = weakref.ref(optimizer)
        self.steps = 0
        self.elements = sum(map(elements, trained))
        self.waiting = {id(item): weakref.ref(item) for item in trained}
        self.had_gradient: set[int] = set()

    def look(self) -> None:
        """Drop those that have one now."""
        self.steps += 1
        read = self.steps <= READ_FIRST or self.steps & (self.steps - 1) == 0
        for key, reference in list(self.waiting.items()):
            parameter = reference()
            gradient = None if parameter is None else parameter.grad
            if parameter is None:
                del self.waiting[key]
            elif gradient is not None and (read or key not in self.had_gradient):
                self.had_gradient.add(key)
                if _not_zero(gradient):
                    del self.waiting[key]


class _Mode:
    """How often one root module was in evaluation mode."""

    def __init__(self) -> None:
        self.steps = self.in_eval = self.last_in_eval = 0

    def see(self, training: bool) -> None:
        """A step ended in this mode."""
        self.steps += 1
        self.in_eval += not training
        self.last_in_eval = 0 if training else self.last_in_eval + 1


class Recipe:
    """Looks and keeps; `facts` tells."""

    def __init__(self) -> None:
        self.patches = Patches()
        self.evaluations = Evaluations()
        self.schedulers: set[str] = set()
        self.put_in_eval: set[int] = set()
        self.loaded = False
        self.rates: tuple[float, ...] | None = None
        self.first_rates: tuple[float, ...] | None = None
        self.rate_changes: int | None = 0
        self.modes: dict[int, _Mode] = {}
        self.pending: dict[int, _Pending] = {}
        self._handle: Any = None

    # -- while the script runs -----------------------------------------------------------------------------------

    def install(self, torch: Any) -> None:
        """Listen for schedulers, evaluation mode, loaded weights and optimizer steps."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        schedulers = torch.optim.lr_scheduler
        # The second does not call the first.
        for kind in (schedulers.LRScheduler, schedulers.ReduceLROnPlateau):
            self._note_calls(kind, "__init__", lambda this, *_, **__: self.schedulers.add(type(this).__name__))
        module = torch.nn.Module

        def mode(this: Any, mode: bool = True) -> None:
            if not mode:
                self.put_in_eval.add(id(this))

        self._note_calls(module, "train", mode)

        def load(*_: Any, **__: Any) -> None:
            self.loaded = True

        self._note_calls(module, "load_state_dict", load)
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def listen(self, torch: Any) -> None:
        """Listen to the losses of evaluation too. Not before the first step: `torch.jit.script` reads their source."""
        self.evaluations.install(torch, self.patches)

    def _note_calls(self, owner: Any, name: str, note: Any) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return original(*args, **kwargs)

        self.patches.set(owner, name, like(original, noted))

    def close(self) -> None:
        """Take everything out."""
        if self._handle is not None:
            self._handle.remove()
        self.patches.close()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        pending = self.pending.get(id(optimizer))
        if pending is None or pending.optimizer() is not optimizer:
            pending = self.pending[id(optimizer)] = _Pending(optimizer)
        pending.look()

    def on_step(self, watch: Watch, record: StepRecord) -> None:
        """A global step has ended."""
        self.evaluations.step_ended(record)
        rates = learning_rates(list(_alive(watch.optimizers)))
        if rates is None:
            self.rate_changes = None
        elif self.rates is None:
            self.first_rates = rates
        elif self.rate_changes is not None and rates != self.rates:
            self.rate_changes += 1
        self.rates = rates
        for module in _alive(watch.models):
            mode = self.modes.get(id(module))
            if mode is None:
                mode = self.modes[id(module)] = _Mode()
            mode.see(module.training)

    # -- when it has been watched --------------------------------------------------------------------------------

    def facts(
        self, watch: Watch, records: Sequence[StepRecord], losses: Sequence[float], files: Sequence[Path]
    ) -> RecipeFacts:
        """What was seen; `losses` are those of the steps, `files` the script's own sources."""
        optimizers = list(_alive(watch.optimizers))
        optimized = {id(item) for optimizer in optimizers for item in parameters_of(optimizer)}
        names = {id(item): name for module in _alive(watch.models) for name, item in module.named_parameters()}
        curve, stride = thinned(losses)
        apart = evaluates_apart(records)
        no_gradient, zero = self._left_out(names)
        decay, vectors = decayed_vectors(optimizers)
        return RecipeFacts(
            curve=curve,
            stride=stride,
            first_not_finite=next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None),
            rate_first=self.first_rates[0] if self.first_rates else None,
            rate_last=self.rates[0] if self.rates else None,
            rate_changes=self.rate_changes,
            schedulers=tuple(sorted(self.schedulers)),
            declared=declared(files),
            evaluations=sum(1 for item in records if item.number and item.nograd_calls) if apart else 0,
            loaded=self.loaded,
            modes=tuple(self._mode(watch, module, optimized) for module in _alive(watch.models)),
            gradient_steps=min((item.steps for item in self.pending.values()), default=0),
            no_gradient=no_gradient,
            zero_gradient=zero,
            not_optimized=_not_optimized(watch, optimizers),
            decay=decay,
            decayed_vectors=vectors,
            scores=self.evaluations.scores(losses) if apart else (),
        )

    def _mode(self, watch: Watch, module: Any, optimized: set[int]) -> ModelMode:
        mode = self.modes.get(id(module)) or _Mode()
        return ModelMode(
            name=type(module).__name__,
            steps=mode.steps,
            eval_steps=mode.in_eval,
            last_eval_steps=mode.last_in_eval,
            trained_in_eval=id(module) in watch._eval_trains,
            put_in_eval=any(id(item) in self.put_in_eval for item in module.modules()),
            optimized=any(id(item) in optimized for item in module.parameters()),
            mode_layers=mode_layers(module),
        )

    def _left_out(self, names: dict[int, str]) -> tuple[LeftOut, LeftOut]:
        """Parameters without a gradient, and with zeros only."""
        without: list[Any] = []
        zeros: list[Any] = []
        for pending in self.pending.values():
            for key, reference in pending.waiting.items():
                parameter = reference()
                if parameter is not None and parameter.requires_grad:
                    (zeros if key in pending.had_gradient else without).append(parameter)
        whole = sum(item.elements for item in self.pending.values())
        return _left_out(without, names, whole), _left_out(zeros, names, whole)


def thinned(losses: Sequence[float]) -> tuple[tuple[float, ...], int]:
    """The loss curve as means of equally many consecutive steps, and how many; those not finite are left out."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    stride = max(1, math.ceil(len(finite) / CURVE))
    whole = len(finite) - len(finite) % stride
    return tuple(math.fsum(finite[i : i + stride]) / stride for i in range(0, whole, stride)), stride


def _alive(references: Iterable[Any]) -> Iterator[Any]:
    return (item for reference in references if (item := reference()) is not None)


def _not_zero(gradient: Any) -> bool:
    try:
        return bool((gradient._values() if gradient.is_sparse else gradient).any())
    except (RuntimeError, NotImplementedError):
        return True  # cannot be read, so nothing is said


def _not_optimized(watch: Watch, optimizers: list[Any]) -> LeftOut:
    """What has a gradient although no optimizer, not even one that has yet to step, holds it."""
    from torch.optim import Optimizer

    made = [item for item in _alive(watch._alive.values()) if isinstance(item, Optimizer)]
    held = {id(item) for optimizer in [*optimizers, *made] for item in parameters_of(optimizer)}
    seen = {id(item): (name, item) for module in _alive(watch.models) for name, item in module.named_parameters()}
    left = [item for key, (_, item) in seen.items() if item.grad is not None and key not in held]
    whole = sum(elements(item) for _, item in seen.values() if item.requires_grad)
    return _left_out(left, {key: name for key, (name, _) in seen.items()}, whole)


def _left_out(parameters: Sequence[Any], names: dict[int, str], whole: int) -> LeftOut:
    return LeftOut(
        names=tuple(names[id(item)] for item in parameters if id(item) in names)[:NAMES],
        tensors=len(parameters),
        share=sum(map(elements, parameters)) / whole if whole else 0.0,
    )
