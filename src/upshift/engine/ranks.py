"""Several processes that train together: the same methods as `Group`, over torch.distributed.

Host values (what ranks agree on, JSON) travel over gloo also where tensors travel over NCCL, so that they cost no
synchronisation of the device. Every collective made here is marked for the watch, which names a rank that does not
come; a collective that fails because a peer is gone becomes a `DistributedError` that says which one.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from upshift.engine.channel import Channel
from upshift.engine.group import SAFE_STEPS, Exchanges, Group
from upshift.engine.memory import is_out_of_memory
from upshift.engine.peers import Progress
from upshift.engine.watch import Watch
from upshift.errors import DistributedError, UsageError

if TYPE_CHECKING:
    import torch

    from upshift.engine.gradients import Buckets

#: Seconds that torch's own timeout leaves to the watch, which says more.
AFTER_THE_WATCH = 60.0

#: Seconds within which the watch has found out who is gone, once a connection broke.
FINDING_OUT = 2.0

#: Process groups that were left. Where the last reference to one goes, gloo's threads are joined; one of them may be
#: giving back a tensor at that moment, for which it needs the interpreter's lock, which the joining thread holds.
_left: list[Any] = []


class Ranks(Group):
    """One of several processes; made by `Group.here()`."""

    def __init__(
        self, rank: int, world: int, local_rank: int, device: torch.device, store: Any, watch: Watch | None,
        timeout: float = 600.0,
    ) -> None:  # fmt: skip
        super().__init__(device)
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.store = store
        self.watch = watch
        self.progress = watch.progress if watch is not None else Progress()
        self._ddp: Any = None
        self._sharded = False
        self._buckets: Buckets | None = None
        self._buffers: list[torch.Tensor] = []
        self._reductions = 0
        self._overlaps = False
        self._reduced = False
        self._open = True
        self._channels: list[Channel] = []
        self.timeout = timeout

    @classmethod
    def join(
        cls,
        rank: int,
        world: int,
        local_rank: int,
        device: torch.device,
        *,
        timeout: float,
        arrive: float,
        say: Callable[[str], None] | None,
        watch: bool,
    ) -> Ranks:
        """Meet the other ranks and make the process group."""
        import torch

        from upshift.engine import launcher
        from upshift.engine.preflight import meet
        from upshift.engine.watch import on_stderr

        dist: Any = torch.distributed
        if not dist.is_available():
            raise UsageError(
                "this build of torch cannot train in several processes.",
                remedy="Install one with torch.distributed, or unset RANK and WORLD_SIZE to train in one process.",
            )
        if dist.is_initialized():
            raise UsageError(
                "torch.distributed is initialised already.",
                remedy="Leave init_process_group to upshift: remove it from the job's file.",
            )
        say = say or on_stderr
        launcher.guard(say)
        store = meet(rank, world, arrive)
        cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout + AFTER_THE_WATCH),
                device_id=device if cuda else None,
            )
        except RuntimeError as error:
            raise DistributedError(
                f"the ranks met, but could not be connected: {_first_line(error)}",
                remedy="Check that every machine can reach the others; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name "
                "the network interface.",
            ) from error
        found = Watch.over(rank, world, store, timeout, say) if watch else None
        if found is not None:
            found.start()
        return cls(rank, world, local_rank, device, store, found, timeout)

    # -- collectives ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Marks a collective for the watch; a broken connection becomes an error that names who is gone."""
        self.progress.enter(name)
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._broken(name, error) from error
        finally:
            self.progress.leave()

    def _broken(self, name: str, error: Exception) -> Exception:
        until = time.monotonic() + FINDING_OUT
        while self.watch is not None and not self.watch.lost and time.monotonic() < until:
            time.sleep(0.05)
        known = self.watch.lost if self.watch is not None else ""
        return DistributedError(
            known or f"{name} with the other ranks failed: {_first_line(error)}",
            remedy="Start again: the run resumes from its newest checkpoint (torchrun --max-restarts does it by "
            "itself).",
        )

    def agree(self, values: list[float]) -> list[float]:
        self.progress.steps += 1
        return self._sum(values, "agree")

    def sum(self, values: list[float]) -> list[float]:
        return self._sum(values, "sum")

    def _sum(self, values: list[float], name: str) -> list[float]:
        import torch
        import torch.distributed as dist

        told = torch.tensor(values, dtype=torch.float64)
        with self.collective(name):
            dist.all_reduce(told)
        result: list[float] = told.tolist()
        return result

    def gather(self, obj: Any) -> list[Any] | None:
        import torch
        import torch.distributed as dist

        own = _packed(obj)
        with self.collective("gather"):
            sizes = torch.zeros(self.world, dtype=torch.int64)
            sizes[self.rank] = own.numel()
            dist.all_reduce(sizes)
            longest = int(sizes.max())
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: own.numel()] = own
            parts = [torch.empty_like(padded) for _ in range(self.world)] if self.main else None
            dist.gather(padded, parts, dst=0)
        if parts is None:
            return None
        return [_unpacked(part[: int(size)]) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def broadcast(self, obj: Any) -> Any:
        import torch
        import torch.distributed as dist

        own = _packed(obj) if self.main else torch.empty(0, dtype=torch.uint8)
        with self.collective("broadcast"):
            size = torch.tensor([own.numel()], dtype=torch.int64)
            dist.broadcast(size, src=0)
            told = own if self.main else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(told, src=0)
        return _unpacked(told)

    def channel(self) -> Exchanges:
        import torch

        dist: Any = torch.distributed
        self._channels.append(
            Channel(
                dist.PrefixStore(f"channel-{len(self._channels)}", self.store.clone()), self.rank, self.world,
                timeout=self.timeout, lost=lambda: self.watch.lost if self.watch is not None else "",
            )
        )  # fmt: skip
        return self._channels[-1]

    def barrier(self) -> None:
        self._sum([0.0], "barrier")

    # -- the model and its gradients -----------------------------------------------------------------------------------

    def wrap(self, model: torch.nn.Module, kind: str = "ddp") -> torch.nn.Module:
        from upshift.engine import wrapping

        super().wrap(model, kind)
        # Sharded or not: every rank holds all buffers, and its forward passes change its own.
        self._buffers = list(model.buffers())
        with self.collective(f"wrapping the model ({kind})"):
            if kind == "fsdp2":
                self._sharded = True
                return wrapping.fsdp2(model, self.device, self.world)
            wrapped = wrapping.ddp(model, self.device)
        self._ddp = wrapped if wrapped is not model else None
        return wrapped

    def no_sync(self, last: bool = False) -> AbstractContextManager[Any]:
        # FSDP2 adds up sharded gradients, micro-batch by micro-batch: whole ones would cost the memory it is there for.
        if self._sharded:
            return self._exchanging()
        if self._ddp is None:
            return contextlib.nullcontext()
        if last and self._overlaps:
            self._reduced = True
            return self._exchanging()
        context: AbstractContextManager[Any] = self._ddp.no_sync()
        return context

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Around passes in which torch exchanges weights or gradients: who drops out leaves the others waiting."""
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                self.give_up("out of memory while the ranks exchange weights or gradients; use a smaller micro-batch")
            if disconnected(error):
                raise self._broken("exchanging weights or gradients", error) from error
            raise

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        from upshift.engine.gradients import Buckets, broadcast_tensors, own_parameters

        if self._reduced:
            self._reduced = False
        elif own := own_parameters(parameters):
            if self._buckets is None or not self._buckets.fits(own):
                self._buckets = Buckets(own, self.world)
            with self.collective("reduce_gradients"):
                self._buckets.average()
            self._reductions += 1
            if self._reductions == SAFE_STEPS and self.device.type == "cuda" and self._ddp is not None:
                self._overlaps = self._sum([float(self._buckets.missing)], "reduce_gradients")[0] == 0.0
        if self._buffers:
            with self.collective("buffers"):
                broadcast_tensors(self._buffers)

    # -- the end -------------------------------------------------------------------------------------------------------

    def at(self, step: int, phase: str) -> None:
        self.progress.step, self.progress.phase = step, phase

    def give_up(self, why: str) -> None:
        from upshift.engine.watch import end, on_stderr

        (self.watch.say if self.watch is not None else on_stderr)(f"rank {self.rank} gives up: {why}")
        if self.watch is not None:
            self.watch.publish(f"rank {self.rank} gave up: {why}")
        end()

    def close(self) -> None:
        import torch.distributed as dist

        if not self._open:
            return
        self.barrier()
        self._open = False
        self._close_channels()
        if self.watch is not None:
            self.watch.stop(on_purpose=True)
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()

    def leave(self, error: BaseException) -> None:
        if not self._open:
            return
        self._open = False
        self._close_channels()
        # The process group stays as it is: destroying it may wait for ranks that do not come any more.
        if self.watch is None:
            return
        asked = isinstance(error, (SystemExit, KeyboardInterrupt))
        if not asked and not self.watch.lost:
            self.watch.publish(f"rank {self.rank} ended: {type(error).__name__}: {_first_line(error)}")
        self.watch.stop(on_purpose=asked)

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()


def _packed(obj: Any) -> torch.Tensor:
    """JSON as a tensor of uint8."""
    import torch

    return torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)


def _unpacked(told: torch.Tensor) -> Any:
    return json.loads(bytes(told.tolist()))


def disconnected(error: Exception) -> bool:
    """Whether this says that another rank cannot be reached any more."""
    import torch

    # NCCL has a type for it, gloo only names itself.
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
