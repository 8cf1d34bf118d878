"""The append-only log of a run (JSON lines), written so that it can be read after `kill -9`; read by `runfold`."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from upshift.errors import EnvironmentError_

LOG = "log.jsonl"


class RunLog:
    """Appends events to `<folder>/log.jsonl`, one write a line, so that a kill tears at most the last line."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            EnvironmentError_: the folder cannot be made or written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise EnvironmentError_(
                f"the run folder {folder} cannot be written: {error.strerror}.",
                remedy="Free some space, or name another folder with --runs DIR.",
            ) from None
        self.folder = folder
        self.broken = ""
        self._file = self._identity()
        self._torn = False

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._fd)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def append(self, kind: str, **fields: Any) -> None:
        """Append one event. A full disk is remembered in `broken`, never raised: training goes on."""
        line = msgspec.json.encode({"kind": kind, **fields}) + b"\n"
        if self._file is None or self._identity() != self._file:
            # A script may close every descriptor; the number may be a file of its own by now.
            self.broken = "its file was closed by the script"
            return
        try:
            # After a write cut short the next line starts anew.
            written = os.write(self._fd, b"\n" + line if self._torn else line)
            self._torn = written < len(line)
            if self._torn:
                self.broken = os.strerror(errno.ENOSPC)
        except OSError as error:
            self.broken = error.strerror or str(error)

    def close(self) -> None:
        """Close the file, if it is still ours."""
        if self._file is not None and self._identity() == self._file:
            os.close(self._fd)
        self._file = None


def new_id() -> str:
    """A run id that sorts by start time: `20261121-104500-4242`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
