"""Reads JSON lines of a file that grows, never waiting for it, and never holding more than a bounded piece of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec

#: Bytes taken in by one read, and of the longest line that is ours.
MOST_AT_ONCE = 1 << 20
MAX_LINE = 1 << 20

#: As many bytes before the place reached are compared, to see whether the file is still the one that was read.
_KNOWN = 64


class Tail:
    """The lines added to `path` since the last `read`.

    A last line without its line break waits until it is whole. A file that was cut or replaced is read from its start.
    """

    def __init__(self, path: Path, *, most: int = MOST_AT_ONCE) -> None:
        """
        Args:
            path: the file; it need not be there yet.
            most: bytes taken in by one `read`.
        """
        self.path = path
        self.torn = 0
        """Lines that were no JSON object with a `kind`, or too long."""
        self.more = False
        """Whether the last read stopped at its bound and not at the end of the file."""
        self._most = most
        self._file: tuple[int, int] | None = None
        self._reached = 0
        self._before = b""
        self._rest = b""
        self._skipping = False

    def read(self) -> list[dict[str, Any]]:
        """What is new: decoded objects, each with a string `kind`. Nothing where the file cannot be read."""
        data = self._new_bytes()
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if self._skipping and lines:
            del lines[0]
            self._skipping = False
        found = [item for line in lines if line and (item := self._decoded(line)) is not None]
        if len(self._rest) > MAX_LINE:
            self.torn += not self._skipping
            self._rest, self._skipping = b"", True
        elif self._skipping:
            self._rest = b""
        return found

    def _new_bytes(self) -> bytes:
        self.more = False
        try:
            # A pipe of this name would wait for its writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return b""
            if not self._same(fd, status):
                self._reached, self._before, self._rest, self._skipping = 0, b"", b"", False
            self._file = (status.st_dev, status.st_ino)
            data = os.pread(fd, self._most, self._reached)
        except OSError:
            return b""
        finally:
            os.close(fd)
        self._reached += len(data)
        self._before = (self._before + data)[-_KNOWN:]
        self.more = self._reached < status.st_size and bool(data)
        return data

    def _same(self, fd: int, status: os.stat_result) -> bool:
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self._reached:
            return False
        known = self._before
        return os.pread(fd, len(known), self._reached - len(known)) == known

    def _decoded(self, line: bytes) -> dict[str, Any] | None:
        try:
            found = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("kind"), str) and len(line) <= MAX_LINE:
            return found
        self.torn += 1
        return None
