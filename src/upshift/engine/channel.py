"""What the ranks tell each other about a checkpoint while they train: short texts through the store of the ranks.

A thread that saves beside the training may not enter the collectives of the training, whose order is that of the main
thread. It needs no collective: a digest and a verdict are a few hundred bytes, and go through the store that the ranks
met at, on a connection of their own. An exchange ends in any case: with the texts, when it is known that a rank is
gone, when the run is over, or after a time.

    gather      every rank but 0 leaves its text at said/<n>/<rank>; rank 0 takes them all
    broadcast   rank 0 leaves its text at verdict/<n>; the others read it
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from upshift import units
from upshift.errors import CheckpointError

#: Bytes of one entry; the store takes no more than 8 MiB.
MOST = 4 * 2**20

#: Seconds between two looks at the store, at first and at most.
LOOK, SLOW = 0.002, 0.05

#: Rank 0 gives its verdict at the latest after waiting for the others and doing its own part; they wait as much longer.
PATIENCE = 2.0


class Channel:
    """The exchanges of the checkpoints of one rank: `gather` and `broadcast`, by one thread at a time.

    All ranks make the same ones in the same order. One on which a rank was left without a verdict is not used again:
    what it would say later might be taken for the answer to something else.
    """

    def __init__(
        self, store: Any, rank: int, world: int, *, timeout: float, lost: Callable[[], str] = lambda: ""
    ) -> None:
        """
        Args:
            store: a connection that nobody else uses, alike on all ranks.
            timeout: seconds that rank 0 waits for the other ranks.
            lost: says which rank is gone once that is known; asked while it waits.
        """
        self._store, self._rank, self._world = store, rank, world
        self._timeout, self._lost = timeout, lost
        self._n = 0
        self._stale = ""
        self._broken = ""

    def gather(self, obj: Any) -> list[Any] | None:
        """Every rank's `obj` (JSON) in rank order, on rank 0; None elsewhere.

        Raises:
            CheckpointError: a rank did not answer in time, or is gone.
        """
        self._n += 1
        names = [f"said/{self._n}/{rank}" for rank in range(1, self._world)]
        if self._rank:
            self._put(names[self._rank - 1], obj)
            return None
        found = [obj]
        until = time.monotonic() + self._timeout
        for rank, name in enumerate(names, 1):
            found.append(self._take(name, until, f"rank {rank}"))
        # Whoever speaks now has heard the verdict before.
        if self._stale:
            self._forget(self._stale)
        return found

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's `obj` (JSON), on every rank.

        Raises:
            CheckpointError: rank 0 did not answer in time, or is gone.
        """
        name = f"verdict/{self._n}"
        if not self._rank:
            self._put(name, obj)
            self._stale = name
            return obj
        try:
            return self._take(name, time.monotonic() + PATIENCE * self._timeout, "rank 0")
        except CheckpointError as error:
            self._broken = self._broken or error.message
            raise

    def close(self) -> None:
        """End what waits, and all that comes later."""
        self._broken = self._broken or "the run is over."

    def _put(self, name: str, obj: Any) -> None:
        text = json.dumps(obj)
        parts = [text[start : start + MOST] for start in range(0, len(text), MOST)]
        for number, part in enumerate(parts[1:], 1):
            self._reach(self._store.set, f"{name}+{number}", part)
        # The first one comes last: who sees it finds the others.
        self._reach(self._store.set, name, f"{len(parts)} {parts[0]}")

    def _take(self, name: str, until: float, who: str) -> Any:
        pause = LOOK
        while not self._reach(self._store.check, [name]):
            if gone := self._lost():
                raise CheckpointError(f"{who} did not answer: {gone}.", remedy=_REMEDY)
            if time.monotonic() > until:
                raise CheckpointError(f"{who} did not answer within {units.seconds(self._timeout)}.", remedy=_REMEDY)
            time.sleep(pause)
            pause = min(2 * pause, SLOW)
        count, _, first = self._reach(self._store.get, name).decode().partition(" ")
        rest = [self._reach(self._store.get, f"{name}+{number}").decode() for number in range(1, int(count))]
        if not self._rank:
            self._forget(name, int(count))
        return json.loads(first + "".join(rest))

    def _forget(self, name: str, count: int = 1) -> None:
        for key in (name, *(f"{name}+{number}" for number in range(1, count))):
            self._reach(self._store.delete_key, key)

    def _reach(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self._broken:
            raise CheckpointError(f"the ranks cannot agree on a checkpoint: {self._broken}", remedy=_REMEDY)
        try:
            return call(*arguments)
        except (RuntimeError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"the other ranks cannot be reached: {lines[0]:.200}", remedy=_REMEDY) from None


_REMEDY = "The checkpoints before it are untouched; a run that is started again resumes from the newest."
