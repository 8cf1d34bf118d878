"""How the ranks of one checkpoint talk: every rank's word to rank 0, rank 0's word to all, failures alike on all.

Every exchange is entered by every rank, whatever has failed on it, so that none waits for one that gave up. Where ranks
cannot be heard of, rank 0 still says so to all the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from upshift.errors import CheckpointError, InUseError

T = TypeVar("T")

Gather = Callable[[Any], "list[Any] | None"]
Broadcast = Callable[[Any], Any]


class Ranks:
    """The processes that write one checkpoint together; one process needs neither function.

    Args:
        rank, world: which of how many.
        gather: obj (JSON) -> on rank 0 the list of all ranks' objs, None elsewhere; may raise where one is silent.
        broadcast: obj (JSON, rank 0's counts) -> rank 0's obj, on every rank; may raise where rank 0 is silent.
    """

    def __init__(self, rank: int, world: int, gather: Gather | None, broadcast: Broadcast | None) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if world > 1 and (gather is None or broadcast is None):
            raise ValueError("more than one process needs gather= and broadcast=")
        self.rank, self.world = rank, world
        self._gather = gather or (lambda obj: [obj])
        self._broadcast = broadcast or (lambda obj: obj)

    def decide(self, on_root: Callable[[list[Any]], T], local: Callable[[], Any] = lambda: None) -> T:
        """`local()` on every rank, `on_root(their results)` on rank 0; its result (JSON) on every rank.

        Raises:
            UpshiftError, OSError: on the rank where it was raised.
            CheckpointError: on every other rank, with the same text.
        """
        mine, own = _attempt(local)
        mistake: Exception | None = None
        verdict: Any = None
        said: list[Any] | None = None
        try:
            said = self._gather(own)
        except Exception as error:
            if self.rank:
                raise
            mistake, verdict = error, _failure(error)
        if said is not None:
            failed = [(rank, item["failed"]) for rank, item in enumerate(said) if "failed" in item]
            if failed:
                where = "" if self.world == 1 else f"rank {failed[0][0]}: "
                verdict = {"failed": {**failed[0][1], "message": where + failed[0][1]["message"]}}
            else:
                mistake, verdict = _attempt(lambda: on_root([item["value"] for item in said]))
        verdict = self._broadcast(verdict)
        if mine or mistake:
            raise mine or mistake  # type: ignore[misc]
        if "failed" in verdict:
            text = verdict["failed"]
            kind = InUseError if text["in_use"] else CheckpointError
            raise kind(text["message"], remedy=text["remedy"])
        found: T = verdict["value"]
        return found


def _attempt(act: Callable[[], Any]) -> tuple[Exception | None, dict[str, Any]]:
    try:
        return None, {"value": act()}
    except Exception as error:
        return error, _failure(error)


def _failure(error: Exception) -> dict[str, Any]:
    message = getattr(error, "message", "") or f"{type(error).__name__}: {error}"
    return {"failed": {"message": message, "remedy": getattr(error, "remedy", ""),
                       "in_use": isinstance(error, InUseError)}}  # fmt: skip
