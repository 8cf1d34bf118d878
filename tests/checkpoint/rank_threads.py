"""Several ranks of a store in one process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from upshift.checkpoint import Store
from upshift.checkpoint.disk import Disk
from upshift.errors import CheckpointError


class Threads:
    """Ranks as threads, with gather and broadcast of their own; `disks` are those of the ranks."""

    def __init__(self, folder: Path, world: int = 2, disks: Sequence[Disk | None] = ()) -> None:
        self.folder, self.disks = folder, disks or (None,) * world
        self.world, self.barrier, self.slots = world, threading.Barrier(world, timeout=20), [None] * world

    def exchange(self, rank, obj):
        self.slots[rank] = msgspec.json.decode(msgspec.json.encode(obj))
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def run(self, act):
        results = [None] * self.world

        def one(rank):
            store = Store(
                self.folder, rank, self.world,
                gather=lambda obj: found if (found := self.exchange(rank, obj)) and rank == 0 else None,
                broadcast=lambda obj: self.exchange(rank, obj)[0], disk=self.disks[rank],
            )  # fmt: skip
            try:
                results[rank] = act(rank, store)
            except CheckpointError as error:
                results[rank] = error
            finally:
                store.close()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
