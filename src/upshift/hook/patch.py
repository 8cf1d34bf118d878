"""Reversible patches. Every attribute upshift replaces in a foreign module goes through here."""

from __future__ import annotations

from typing import Any

_MISSING = object()


class Patches:
    """A stack of replaced attributes; `close` restores them, last first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace `owner.name`; what lies in the owner's own dictionary is what will be restored."""
        before = vars(owner).get(name, _MISSING)
        self._undo.append((owner, name, before, value))
        setattr(owner, name, value)

    def names(self) -> tuple[str, ...]:
        """What is patched, for the list a run prints."""
        return tuple(f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _, _ in self._undo)

    def close(self) -> None:
        """Restore everything that still holds our value; something patched over ours is left alone."""
        while self._undo:
            owner, name, before, value = self._undo.pop()
            if vars(owner).get(name, _MISSING) is not value:
                continue
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
