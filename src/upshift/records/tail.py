"""The new whole lines of a file that another process appends to, read a block at a time."""

from __future__ import annotations

import os
from pathlib import Path

#: A longer line is not one of ours; it comes back as `SPOILT`.
MAX_LINE = 1 << 20

#: Bytes read at once.
BLOCK = 1 << 20

#: Stands for a line too long to be kept; nothing can be read from it.
SPOILT = b"\0"


class Tail:
    """Reads on from where it last stopped. A line without its end waits until the end is written.

    A file that was replaced, or has become shorter, is read from its beginning: `generation` counts up, and whoever
    has added up what came before starts anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self.offset = self.size = 0
        self.changed: float | None = None
        """When the file was last written, in seconds since the epoch."""
        self._file: tuple[int, int] | None = None
        self._rest = b""
        self._spoilt = False

    @property
    def share(self) -> float:
        """How much of the file has been read, 0..1."""
        return self.offset / self.size if self.size else 1.0

    def read(self) -> list[bytes]:
        """The lines of the next block, without their ends and without empty ones.

        Raises:
            OSError: the file is not there, or cannot be read.
        """
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._file is not None and (identity != self._file or status.st_size < self.offset):
                self.generation += 1
                self.offset, self._rest, self._spoilt = 0, b"", False
            self._file, self.size, self.changed = identity, status.st_size, status.st_mtime
            file.seek(self.offset)
            block = file.read(BLOCK)
        self.offset += len(block)
        if not block:
            return []
        *lines, rest = (self._rest + block).split(b"\n")
        if self._spoilt and lines:
            lines[0], self._spoilt = SPOILT, False
        if self._spoilt or len(rest) > MAX_LINE:
            rest, self._spoilt = b"", True
        self._rest = rest
        return [line if len(line) <= MAX_LINE else SPOILT for line in lines if line]

    def last(self) -> list[bytes]:
        """What stands after the last line end: a line cut short, or one that is still being written."""
        rest, self._rest = SPOILT if self._spoilt else self._rest, b""
        self._spoilt = False
        return [rest] if rest else []
