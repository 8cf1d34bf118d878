"""The rates of an optimizer as training goes on: `rates(step)` before each step, whatever the schedule is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch


class Rates:
    """The rates of one optimizer under a pure function of the step. They are set now for step 0, and at each call.

    Args:
        optimizer: its groups' rates as they are now are the base rates. factor: what they are multiplied by.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self._optimizer, self._factor = optimizer, factor
        self._bases = [float(group["lr"]) for group in optimizer.param_groups]
        for group, base in zip(optimizer.param_groups, self._bases, strict=True):
            group["initial_lr"] = base  # where torch's own schedulers keep it
        self(0)

    def __call__(self, step: int) -> None:
        """Set the rates for the step after `step` optimizer steps."""
        factor = self._factor(step)
        groups, bases = self._optimizer.param_groups, self._bases
        if len(groups) > len(bases):  # parameters that were unfrozen later
            bases.extend(float(group.setdefault("initial_lr", group["lr"])) for group in groups[len(bases) :])
        for group, base in zip(groups, bases, strict=True):
            if type(group["lr"]) is float:
                group["lr"] = base * factor
            else:
                _set(group, base * factor)

    def evaluated(self, value: float) -> None:
        """A metric changes nothing here."""

    def state_dict(self) -> dict[str, Any]:
        """The base rates; where it stands is a function of the step."""
        return {"bases": list(self._bases)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the base rates of the saved run; call with the step to set the rates."""
        self._bases = [float(base) for base in state["bases"]]


class TorchRates:
    """A scheduler of torch, stepped as often as training is: after every optimizer step, or every so many.

    Args:
        scheduler: what the job's function returned; its constructor has set the rate of step 0.
        every: optimizer steps between two calls of its `step()`.

    Raises:
        UsageError: it has no `step()`.
    """

    def __init__(self, scheduler: Any, every: int = 1) -> None:
        if not callable(getattr(scheduler, "step", None)):
            raise UsageError(
                f"schedule(optimizer) returned a {type(scheduler).__name__}, not a scheduler.",
                remedy="Declare a schedule of upshift.engine.schedules, or lambda optimizer: CosineAnnealingLR(…).",
            )
        from torch.optim.lr_scheduler import ReduceLROnPlateau

        self.scheduler = scheduler
        self._every, self._made = every, 0
        self._watches = isinstance(scheduler, ReduceLROnPlateau)

    def __call__(self, step: int) -> None:
        """Bring the scheduler to where it is after `step` optimizer steps."""
        while not self._watches and self._made < step // self._every:
            self._made += 1
            self.scheduler.step()

    def evaluated(self, value: float) -> None:
        """Tell the metric of an evaluation to a scheduler that watches one."""
        if self._watches:
            self.scheduler.step(value)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state, and how often it was stepped."""
        return {"made": self._made, "scheduler": _plain(self.scheduler.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the rates themselves come back with the optimizer's state."""
        self._made = int(state["made"])
        self.scheduler.load_state_dict(
            {key: _typed(value, getattr(self.scheduler, key, None)) for key, value in state["scheduler"].items()}
        )


def _set(group: dict[str, Any], rate: float) -> None:
    if hasattr(group["lr"], "fill_"):  # a tensor, which a compiled or captured step reads
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _plain(value: Any) -> Any:
    """The value with plain dicts: torch keeps milestones in a `Counter`, which a checkpoint does not store."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _typed(value: Any, own: Any) -> Any:
    """The value in the kind of dict that the scheduler itself has there."""
    return type(own)(value) if isinstance(own, dict) and isinstance(value, Mapping) else value
