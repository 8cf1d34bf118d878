"""The JSON lines that were added to a file, never waiting for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from upshift.records import tail


class Tail:
    """The lines added to `path` since the last `read`.

    A last line without its line break waits until it is whole. A file that was cut or replaced is read from its start.
    """

    def __init__(self, path: Path, *, most: int = tail.BLOCK) -> None:
        """
        Args:
            path: the file; it need not be there yet.
            most: bytes taken in by one `read`.
        """
        self.path = path
        self.torn = 0
        """Lines that were no JSON object with a `kind`, or too long."""
        self._tail = tail.Tail(path, block=most)

    @property
    def more(self) -> bool:
        """Whether the last read stopped at its bound and not at the end of the file."""
        return self._tail.offset < self._tail.size

    def read(self) -> list[dict[str, Any]]:
        """What is new: decoded objects, each with a string `kind`. Nothing where the file cannot be read."""
        try:
            lines = self._tail.read()
        except OSError:
            return []
        return [item for line in lines if (item := self._decoded(line)) is not None]

    def _decoded(self, line: bytes) -> dict[str, Any] | None:
        try:
            found = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("kind"), str):
            return found
        self.torn += 1
        return None
