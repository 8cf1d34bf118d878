"""The new whole lines of a file that another process appends to, read a block at a time."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

#: A longer line is not one of ours; it comes back as `SPOILT`.
MAX_LINE = 1 << 20

#: Bytes read at once.
BLOCK = 1 << 20

#: As many bytes before the place reached are compared, to see whether the file is still the one that was read.
_KNOWN = 64

#: Stands for a line too long to be kept; nothing can be read from it.
SPOILT = b"\0"


class Tail:
    """Reads on from where it last stopped. A line without its end waits until the end is written.

    A file that was replaced, or has become shorter, is read from its beginning: `generation` counts up, and whoever
    has added up what came before starts anew.
    """

    def __init__(self, path: Path, *, block: int | None = None) -> None:
        """
        Args:
            path: the file; it need not be there yet.
            block: bytes taken in by one `read`; None: `BLOCK`.
        """
        self.path = path
        self._block = block
        self.generation = 0
        self.offset = self.size = 0
        self.changed: float | None = None
        """When the file was last written, in seconds since the epoch."""
        self._file: tuple[int, int] | None = None
        self._rest = self._before = b""
        self._spoilt = False

    @property
    def share(self) -> float:
        """How much of the file has been read, 0..1."""
        return self.offset / self.size if self.size else 1.0

    def read(self) -> list[bytes]:
        """The lines of the next block, without their ends and without empty ones.

        Raises:
            OSError: the file is not there, is none, or cannot be read.
        """
        # A pipe of this name would wait for its writer.
        file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(self.path))
            if self._file is not None and not self._same(file, status):
                self.generation += 1
                self.offset, self._rest, self._before, self._spoilt = 0, b"", b"", False
            self._file, self.size, self.changed = (status.st_dev, status.st_ino), status.st_size, status.st_mtime
            block = os.pread(file, self._block or BLOCK, self.offset)
        finally:
            os.close(file)
        self.offset += len(block)
        self._before = (self._before + block[-_KNOWN:])[-_KNOWN:]
        if not block:
            return []
        *lines, rest = (self._rest + block).split(b"\n")
        if self._spoilt and lines:
            lines[0], self._spoilt = SPOILT, False
        if self._spoilt or len(rest) > MAX_LINE:
            rest, self._spoilt = b"", True
        self._rest = rest
        if lines and all(lines) and max(map(len, lines)) <= MAX_LINE:
            return lines
        return [line if len(line) <= MAX_LINE else SPOILT for line in lines if line]

    def _same(self, file: int, status: os.stat_result) -> bool:
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self.offset:
            return False
        known = self._before
        return os.pread(file, len(known), self.offset - len(known)) == known

    def last(self) -> list[bytes]:
        """What stands after the last line end: a line cut short, or one that is still being written."""
        rest, self._rest = SPOILT if self._spoilt else self._rest, b""
        self._spoilt = False
        return [rest] if rest else []
