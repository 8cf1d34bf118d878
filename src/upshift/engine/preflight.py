"""Before the first step: every rank is there, all hold the same job, and an all-reduce gives the right values.

A wrong network interface, a driver that computes nonsense or a rank with another version of the code would otherwise
show as a hang, or as a loss that is a little off. It takes a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from upshift import units
from upshift.errors import DistributedError

if TYPE_CHECKING:
    from upshift.engine.group import Group
    from upshift.engine.ranks import Ranks

#: Elements of the vector that is summed: large enough to be cut into pieces by ring algorithms.
ELEMENTS = 1 << 16

_LOOK = 0.05


@dataclass(frozen=True)
class Ready:
    """What the preflight found; `seconds` of the checked all-reduce of `bytes` bytes, on the slowest rank."""

    world: int
    bytes: int
    seconds: float


def meet(rank: int, world: int, timeout: float) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks have come to it.

    Raises:
        DistributedError: some did not within `timeout` seconds; they are named.
    """
    import os

    import torch

    dist: Any = torch.distributed
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent hosts the store, otherwise rank 0 does.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host, port, world_size=world, is_master=rank == 0 and not hosted,
            timeout=timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except RuntimeError as error:
        who = "the launcher" if hosted else "rank 0"
        raise DistributedError(
            f"rank {rank} reached nobody at {host}:{port} within {units.seconds(timeout)}: {who} did not come.",
            remedy="Check MASTER_ADDR and MASTER_PORT, that rank 0 runs, and that the port is free there and open in "
            "between.",
        ) from error
    # An agent's store outlives the ranks: what those before a restart have left there is not ours.
    found = dist.PrefixStore(f"upshift-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _all_come(found, "meet", rank, world, timeout)
    return found


def _all_come(store: Any, name: str, rank: int, world: int, timeout: float) -> None:
    """Wait until every rank has called this with `name`."""
    store.set(f"{name}/{rank}", "1")
    waiting = list(range(world))
    until = time.monotonic() + timeout
    while True:
        waiting = [other for other in waiting if not store.check([f"{name}/{other}"])]
        if not waiting:
            return
        if time.monotonic() > until:
            names = ", ".join(str(other) for other in waiting)
            raise DistributedError(
                f"{'ranks' if len(waiting) > 1 else 'rank'} {names} of {world} did not come within "
                f"{units.seconds(timeout)}.",
                remedy="Look at the output of those ranks, and whether their machines can reach MASTER_ADDR.",
            )
        time.sleep(_LOOK)


def preflight(group: Group, *, digest: str = "", parameters: int = 0, timeout: float = 60.0) -> Ready:
    """Check that the ranks can train together; all ranks call it, and all raise alike.

    Args:
        digest: of the job's description.
        parameters: number of parameters of the model.
        timeout: seconds; ranks that did not come within them are named.

    Raises:
        DistributedError: a rank did not come, has another job, model or torch, or the values are wrong.
    """
    from upshift.engine.ranks import Ranks

    if not isinstance(group, Ranks):
        return Ready(1, 0, 0.0)
    _all_come(group.store, f"preflight/{group.progress.calls}", group.rank, group.world, timeout)
    limit = group.watch.limit if group.watch is not None else 0.0
    if group.watch is not None:
        group.watch.limit = timeout
    try:
        _same(group, digest, parameters)
        return _right(group)
    finally:
        if group.watch is not None:
            group.watch.limit = limit


def _same(group: Ranks, digest: str, parameters: int) -> None:
    import torch

    told = group.gather(
        {
            "torch": str(torch.__version__),
            "the job's description": digest,
            "the number of parameters": parameters,
            "the kind of device": group.device.type,
        }
    )
    problem = ""
    if told is not None:
        differ = [
            f"{what} is {other[what]!r} on rank {rank} and {told[0][what]!r} on rank 0"
            for rank, other in enumerate(told)
            for what in told[0]
            if other[what] != told[0][what]
        ]
        problem = "; ".join(differ[:4])
    problem = group.broadcast(problem)
    if problem:
        raise DistributedError(
            f"the ranks do not hold the same: {problem}.",
            remedy="Start the same files with the same versions on every machine.",
        )


def _right(group: Ranks, reduce: Callable[[Any], Any] | None = None) -> Ready:
    """All-reduce a vector whose sum is known: element i of rank r is (r + 1) (i mod 251 + 1), exact in float32."""
    import torch
    import torch.distributed as dist

    place = torch.arange(ELEMENTS, device=group.device) % 251 + 1
    vector = (place * (group.rank + 1)).to(torch.float32)
    expected = (place * (group.world * (group.world + 1) // 2)).to(torch.float32)
    began = time.perf_counter()
    with group.collective("preflight"):
        (reduce or dist.all_reduce)(vector)
    wrong = int((vector != expected).sum())
    seconds = time.perf_counter() - began
    # The verdict goes through the store: the all-reduce is what is in doubt.
    key = f"verdict/{group.progress.calls}"
    group.store.set(f"{key}/{group.rank}", f"{wrong} {seconds!r}")
    told = [text.decode().split() for text in group.store.multi_get([f"{key}/{r}" for r in range(group.world)])]
    bad = {rank: int(count) for rank, (count, _) in enumerate(told) if int(count)}
    if bad:
        said = ", ".join(f"{count} of {ELEMENTS} on rank {rank}" for rank, count in bad.items())
        raise DistributedError(
            f"a sum over the ranks came out wrong in some values ({said}).",
            remedy="The network or a device corrupts data: check drivers and NCCL (NCCL_P2P_DISABLE=1 rules one cause "
            "out), and leave that machine out.",
        )
    return Ready(group.world, vector.numel() * vector.element_size(), max(float(s) for _, s in told))
