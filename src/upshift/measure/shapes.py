"""How many shapes a module's inputs come in."""

from __future__ import annotations

from typing import Any

from upshift.measure.facts import tensors_in


class Shapes:
    """The shapes of the tensors in calls, up to a limit."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._seen: set[tuple[Any, ...]] = set()

    def too_many(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there were more than `most`, this call included."""
        if len(self._seen) <= self.most:
            self._seen.add(tuple(item.shape for item in tensors_in((args, kwargs))))
        return len(self._seen) > self.most
