"""The technique protocol: a card (data) and handlers for the sites it names."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import msgspec

from upshift.records.measurement import ScriptFacts
from upshift.records.plan import Setting

if TYPE_CHECKING:
    import torch

    from upshift.records.measurement import Measurement
    from upshift.sites.moments import Moment


class Numerics(StrEnum):
    """What a technique does to the numbers; selects the test oracle and the acceptance rule.

    bitwise            the same bits
    rounding           the same computation in another precision or order
    reseeds            the same computation and distribution, another random stream
    changes_training   another training
    """

    BITWISE = "bitwise"
    ROUNDING = "rounding"
    RESEEDS = "reseeds"
    CHANGES_TRAINING = "changes_training"


class SettingSpec(msgspec.Struct, frozen=True):
    """One setting of a technique: its default, the values allowed, and the values `tune` tries."""

    default: Setting
    doc: str
    choices: tuple[Setting, ...] = ()
    low: float | None = None
    high: float | None = None

    def problem(self, value: object) -> str:
        """Why `value` is not allowed, or the empty string."""
        wanted = type(self.default)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            return f"expected {wanted.__name__}, got {type(value).__name__}"
        if self.choices and value not in self.choices:
            return f"expected one of {', '.join(map(str, self.choices))}, got {value!r}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if self.low is not None and value < self.low:
                return f"must be at least {self.low:g}, got {value!r}"
            if self.high is not None and value > self.high:
                return f"must be at most {self.high:g}, got {value!r}"
        return ""


class Card(msgspec.Struct, frozen=True):
    """Everything about a technique that can be said without running it.

    `switchable` is `live` where it can be toggled between two steps of one process.
    `targets` are the phases it acts on (see `records.measurement.PHASES`), for ordering trials.
    `tested_on` are device types it has really run on; elsewhere `tune` leaves it off unless asked.
    `after` and `conflicts` name other techniques; they are data, techniques never see one another.
    """

    name: str
    summary: str
    source: str
    sites: tuple[str, ...]
    numerics: Numerics
    switchable: Literal["live", "process"]
    targets: tuple[str, ...]
    details: str = ""
    settings: dict[str, SettingSpec] = {}
    after: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    tested_on: tuple[str, ...] = ("cpu",)
    one_off: bool = False
    """Costs time once (compilation, filling a cache)."""
    saves_memory: bool = False
    """Trades time for memory: `tune` tries it only under a limit (`--fit`), or by name."""
    precision: Literal["optimizer", "float32", "bfloat16"] = "float32"
    """What the parameter updates may differ by: rounding of the optimizer's own arithmetic, of float32 or bfloat16."""


class Verdict(msgspec.Struct, frozen=True):
    """Whether a technique applies to what was seen, why, and with which settings it should be tried.

    `gain` is the predicted speed-up of the whole step (1.0 = none), or None where nothing can be predicted.
    `candidates` are settings to try, most promising first; empty means the defaults.
    """

    applies: bool
    reason: str
    gain: float | None = None
    rests_on: str = ""
    candidates: tuple[dict[str, Setting], ...] = ()


class NoEffect(msgspec.Struct, frozen=True):
    """A technique that was asked for and did nothing says so, with the reason."""

    reason: str


@runtime_checkable
class Applied(Protocol):
    """A technique in effect. `close()` restores everything; `switch` toggles a `live` technique."""

    note: str

    def switch(self, on: bool) -> None:
        """Turn the effect on or off between two steps. Process techniques raise `NotImplementedError`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""

    def effect(self) -> NoEffect | None:
        """None while it does something; otherwise why it did nothing."""

    def close(self) -> None:
        """Restore every hook, attribute and global flag. May be called twice."""


@runtime_checkable
class ForwardApplied(Applied, Protocol):
    """Acts around every call of a root module."""

    def around(self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> Any:  # fmt: skip
        """Call `call(*args, **kwargs)`, changed as need be, and return its output."""


@runtime_checkable
class StepApplied(Applied, Protocol):
    """Acts before every step of an optimizer."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before `optimizer.step` touches a parameter."""


@runtime_checkable
class BackwardApplied(Applied, Protocol):
    """Acts on the loss and the gradients of a training whose loop it is told of (`BackwardSeen`)."""

    problem: str
    """Why the gradients cannot be used at any scale; empty as a rule."""

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What the backward pass of one micro-batch begins with. Shapes: () -> ()."""

    def unscaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Once an update, when its gradients are complete and nothing has looked at them: make them those of the loss.

        Returns:
            Whether they can be used: False, on all ranks, where one of them has overflowed on some rank.
        """


@runtime_checkable
class LossApplied(Applied, Protocol):
    """Acts before every call of a loss function in training."""

    def before_loss(self, arguments: dict[str, Any]) -> None:
        """`arguments` are those of the call, bound to their names, with defaults left out; change in place."""


@runtime_checkable
class CheckpointApplied(Applied, Protocol):
    """Acts on the tensors of a checkpoint, so that it is what the script itself would have written."""

    def written(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` (detached), or what is to be written in its place; `tensor` itself is never changed."""


class Technique(Protocol):
    """One change to the execution of one run. Instances hold no state; what acts is the `Applied`."""

    card: ClassVar[Card]

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """What these settings do to the numbers of a script with these facts."""

    def check(self, seen: Measurement) -> Verdict:
        """Pure: does it apply, and why."""

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Act at a site the card names. None: nothing to do at this one."""


class BaseApplied:
    """A convenient base: nothing to switch, nothing to save."""

    note = ""

    def switch(self, on: bool) -> None:
        """Process techniques cannot be toggled."""
        raise NotImplementedError(f"{type(self).__name__} cannot be switched while running")

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def effect(self) -> NoEffect | None:
        """In effect."""
        return None

    def close(self) -> None:
        """Nothing to restore."""
