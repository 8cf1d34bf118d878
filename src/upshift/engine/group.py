"""The processes that train together. One process is a group of its own and costs nothing.

What the loop does with a group, every step, on every rank:

    for part in batch.parts:
        with group.no_sync(last=part is batch.parts[-1]):
            (loss * part.weight).backward()         # weights carry the factor `world`
    total, bad, full, stop = group.agree([loss, not finite, out of memory, asked to stop])
    ...                                             # all ranks repeat, skip or stop alike, before any long collective
    group.reduce_gradients(model.parameters())
    optimizer.step()

Why agree first, and what it costs. A rank that raised (out of memory) or found a NaN cannot take part in an all-reduce
that the others have already entered; they would wait until a timeout. So gradients stay local (`no_sync`), one small
all-reduce of a few floats says how every rank fared, and only then the gradients are averaged, in flat buckets. The
price is the overlap of communication with the backward pass that torch's own reducer has: on CPU (gloo), where the same
cores would do both, that is always so. On CUDA it holds for the first `SAFE_STEPS` steps, where memory peaks and
mistakes show; afterwards DDP's reducer overlaps, unless some parameter had no gradient in those steps. A rank that runs
out of memory after that cannot be waited for: it calls `give_up`, all ranks end with `LOST` and their launcher starts
them again from the last checkpoint. FSDP2 gathers weights inside the forward pass, so there it is like this from the
first step, and every rank must make the same number of forward passes per step. A NaN passes through any reducer and
reaches all ranks; it needs no order.

Source: Li et al. (2020), "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 13(12).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

Kind = Literal["ddp", "fsdp2"]
KINDS = ("ddp", "fsdp2")

#: Exit code of a rank that ends because another one is gone, frozen or gave up: "temporary failure, try again" of
#: BSD's sysexits. torchrun starts the ranks again where `--max-restarts` allows it.
LOST = 75

#: Steps after which DDP's own reducer may overlap with the backward pass on CUDA. Enough of them for one rank alone to
#: be timed as well (`scaling`), which needs backward passes free of collectives.
SAFE_STEPS = 12

#: What a launcher sets. Without RANK and WORLD_SIZE a process trains alone.
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Exchanges(Protocol):
    """How ranks tell each other something."""

    def gather(self, obj: Any) -> list[Any] | None:
        """Every rank's `obj` in rank order, on rank 0; None elsewhere."""

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's `obj`, on every rank."""


class Group:
    """One process. Several are `upshift.engine.ranks.Ranks`, which has the same methods; `Group.here()` chooses.

    Attributes:
        rank: 0 .. world - 1.
        world: how many processes train together.
        local_rank: rank among those of this machine.
        device: where this process trains.
    """

    rank = 0
    world = 1
    local_rank = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def here(
        cls,
        *,
        device: str = "",
        timeout: float = 600.0,
        arrive: float = 60.0,
        say: Callable[[str], None] | None = None,
        watch: bool = True,
    ) -> Group:
        """The group that this process was started in, from the variables that torchrun and others set.

        Args:
            device: `cpu`, `cuda`; empty: an accelerator where there is one.
            timeout: seconds in one collective after which the ranks that did not come are named and this one ends.
            arrive: seconds that all ranks have to come together in at the start.
            say: is told what a person should read; default: a line on stderr.
            watch: whether to look out for ranks that are gone or stand still.

        Raises:
            UsageError: the variables are incomplete or contradict each other, or there are fewer devices than ranks.
            DistributedError: a rank did not come within `arrive`.
        """
        world = _integer("WORLD_SIZE", 1)
        if world == 1 and _integer("RANK", 0) == 0:
            return Group(pick_device(device, 0))
        missing = [name for name in NEEDED if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"this process is one of several, but {' and '.join(missing)} is not set.",
                remedy="Start the ranks with torchrun, or unset RANK and WORLD_SIZE to train in one process.",
            )
        rank = _integer("RANK", 0)
        if not 0 <= rank < world:
            raise UsageError(
                f"RANK is {rank}, but WORLD_SIZE is {world}.", remedy="Ranks count from 0 to WORLD_SIZE - 1."
            )
        from upshift.engine.ranks import Ranks

        local_rank = _integer("LOCAL_RANK", 0)
        return Ranks.join(
            rank, world, local_rank, pick_device(device, local_rank), timeout=timeout, arrive=arrive, say=say,
            watch=watch,
        )  # fmt: skip

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    # -- every step ----------------------------------------------------------------------------------------------------

    def agree(self, values: list[float]) -> list[float]:
        """The sum of each value over all ranks: one small all-reduce, once a step, before anything that takes long.

        A flag is 0.0 or 1.0; a sum above 0 means that some rank raised it. A NaN stays in its place. float64.
        """
        return values

    def sum(self, values: list[float]) -> list[float]:
        """The sum of each value over all ranks, outside of a step (evaluation)."""
        return values

    def no_sync(self, last: bool = False) -> AbstractContextManager[Any]:
        """Context for the forward and backward pass of one micro-batch; `last`: of the last one of the step."""
        return contextlib.nullcontext()

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average `.grad` over the ranks, after they agreed; nothing where torch's own reducer has done so.

        A parameter without a gradient on every rank keeps none; one with a gradient on some gets the average in which
        the others count as zero. Also makes the buffers of the wrapped model those of rank 0.

        Raises:
            UsageError: a gradient is sparse.
        """

    def clip_gradients(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
        """Scale gradients to at most `max_norm` (L2 norm over all parameters and shards); returns the norm before."""
        from upshift.engine.gradients import clip

        return clip(parameters, max_norm)

    # -- the model -----------------------------------------------------------------------------------------------------

    def wrap(self, model: torch.nn.Module, kind: str = "ddp") -> torch.nn.Module:
        """The module that the loop calls. Make the optimizer afterwards: FSDP2 replaces the parameters.

        Args:
            model: on `device`; rank 0's weights are given to all.
            kind: `ddp` (every rank holds all) or `fsdp2` (weights, gradients and optimizer state are sharded).

        Raises:
            UsageError: no such kind.
        """
        if kind not in KINDS:
            raise UsageError(f"no way to train in parallel is called {kind!r}.", remedy="Use ddp or fsdp2.")
        return model

    def unwrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The person's own module: with FSDP2 the same object, whose parameters are sharded."""
        from upshift.engine.wrapping import unwrapped

        return unwrapped(module)

    # -- now and then --------------------------------------------------------------------------------------------------

    def channel(self) -> Exchanges:
        """`gather` and `broadcast` for another thread, beside the collectives of the training; all ranks call it."""
        return self

    def gather(self, obj: Any) -> list[Any] | None:
        """Every rank's `obj` in rank order, on rank 0; None elsewhere. Travels as JSON.

        Raises:
            TypeError: not JSON-able.
        """
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's `obj`, on every rank. Travels as JSON.

        Raises:
            TypeError: not JSON-able.
        """
        return obj

    def barrier(self) -> None:
        """Returns when every rank has come here."""

    def at(self, step: int, phase: str) -> None:
        """What this rank is doing, for a report on ranks that stand still. Cheap."""

    def give_up(self, why: str) -> None:
        """Something that cannot be mended while the others wait: tell them, and end all ranks with exit code `LOST`.

        In one process: nothing; raise the error instead.
        """

    def close(self) -> None:
        """Leave. Waits for the other ranks; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.leave(error)

    def leave(self, error: BaseException) -> None:
        """Leave because of an error, without waiting: the others are told, so that they do not wait either."""


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process: `wanted`, else CUDA device `local_rank`, else MPS, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    import torch

    kind = wanted or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if not kind.startswith("cuda"):
        return torch.device(kind)
    count = torch.cuda.device_count()
    if kind == "cuda" and local_rank >= count:
        raise UsageError(
            f"local rank {local_rank} has no CUDA device: there are {count} here.",
            remedy=f"Start at most {count} processes on this machine." if count else "Set the device to cpu.",
        )
    found = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    torch.cuda.set_device(found)
    return found


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UsageError(f"{name} is {text!r}, not a number.", remedy="Start the ranks with torchrun.") from None
