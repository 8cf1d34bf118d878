"""Which checkpoints stay: the newest two that are verified, the best, and the last before a spike. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Verified checkpoints that always stay: should the newest turn out damaged, there is another.
NEWEST = 2


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk.

    `verified` is None while this process has not read it; `problem` says why it is False. `bytes` is the size of its
    files. `facts` and `created` are as written.
    """

    path: Path
    step: int
    attempt: int
    serial: int = 1
    world: int = 1
    bytes: int = 0
    best: bool = False
    before_spike: bool = False
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    verified: bool | None = None
    problem: str = ""

    @property
    def order(self) -> tuple[int, int, int]:
        """Newest is greatest: by step, then attempt, then which of that attempt. Clocks have no say."""
        return self.step, self.attempt, self.serial


def to_delete(checkpoints: Iterable[Checkpoint], good: Callable[[Checkpoint], bool]) -> list[Checkpoint]:
    """Checkpoints that may go, oldest first.

    Args:
        checkpoints: all there are.
        good: reads one and says whether it is whole; called from the newest on, only as often as needed.
    """
    ordered = sorted(checkpoints, key=lambda item: item.order, reverse=True)
    read: dict[Path, bool] = {}

    def whole(item: Checkpoint) -> bool:
        if item.path not in read:
            read[item.path] = good(item)
        return read[item.path]

    keep: set[Path] = set()
    for item in ordered:
        if len(keep) < NEWEST and whole(item):
            keep.add(item.path)
    if len(keep) < NEWEST:
        return []
    for marked in ([i for i in ordered if i.best], [i for i in ordered if i.before_spike]):
        keep.update(item.path for item in [next(filter(whole, marked), None)] if item is not None)
    # What is damaged is not for retention to remove.
    return [item for item in reversed(ordered) if item.path not in keep and read.get(item.path, True)]
