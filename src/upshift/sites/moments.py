"""What a technique is handed at each site. A technique sees nothing else of the script.

site                raised
process_env         before the training process exists: environment variables only
process_start       torch is imported, nothing of the script has run
loader_args         a DataLoader is about to be built; its arguments can be changed
loader_ready        a DataLoader was built and is about to be iterated for the first time
model_created       a root module with parameters is about to be called for the first time
optimizer_created   an optimizer is about to make its first step
loss_function       cross_entropy of torch.nn.functional is about to be called for the first time in training
forward             every call of a root module (ForwardApplied.around)
backward            a declared job is about to call its model for the first time (BackwardSeen); then before every
                    backward pass and after the last one of an update (BackwardApplied); scripts do not raise it
step                before every optimizer step (StepApplied.before_step)
loss                every call of that loss function in training (LossApplied.before_loss)
checkpoint          every tensor that torch.save or safetensors is about to write (CheckpointApplied.written)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

SITES = (
    "process_env", "process_start", "loader_args", "loader_ready", "model_created", "optimizer_created",
    "loss_function", "forward", "backward", "step", "loss", "checkpoint", "epoch", "end",
)  # fmt: skip


@dataclass
class Moment:
    """Base of all moments."""

    site: ClassVar[str] = ""


@dataclass
class ProcessEnv(Moment):
    """`env` is the environment of the process to be started; handlers add to it."""

    site: ClassVar[str] = "process_env"
    env: dict[str, str]


@dataclass
class ProcessStart(Moment):
    """Global settings of the fresh process."""

    site: ClassVar[str] = "process_start"
    device: str = "cpu"


@dataclass
class LoaderArgs(Moment):
    """`args` are the bound keyword arguments of `DataLoader.__init__`, with defaults left out; change in place.

    `subclass` is True where the script builds a subclass of DataLoader.
    `main_guard` says whether the script has an `if __name__ == "__main__"` guard (spawned workers run it again).
    """

    site: ClassVar[str] = "loader_args"
    args: dict[str, Any]
    subclass: bool = False
    main_guard: bool = False


@dataclass
class LoaderReady(Moment):
    """A built loader, before its first iterator. `scratch` is a folder for files that may be dropped later."""

    site: ClassVar[str] = "loader_ready"
    loader: torch.utils.data.DataLoader[Any]
    scratch: str = ""


@dataclass
class ModelSeen(Moment):
    """A root module before its first call, with the arguments of that call."""

    site: ClassVar[str] = "model_created"
    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    training: bool = True


def _alone(values: list[float]) -> list[float]:
    return values


@dataclass
class BackwardSeen(Moment):
    """A training whose loop lets its loss be scaled: a declared job, before the first call of its model.

    `agree` sums each value over all ranks; every rank has to call it.
    """

    site: ClassVar[str] = "backward"
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    agree: Callable[[list[float]], list[float]] = _alone


@dataclass
class OptimizerSeen(Moment):
    """An optimizer before its first step."""

    site: ClassVar[str] = "optimizer_created"
    optimizer: torch.optim.Optimizer


@dataclass
class LossFunctionSeen(Moment):
    """A function of `torch.nn.functional` before its first call with gradients on, outside of evaluation."""

    site: ClassVar[str] = "loss_function"
    name: str
