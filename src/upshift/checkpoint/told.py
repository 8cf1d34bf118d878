"""Errors of the filesystem in words: what was not done, why, and that what was there is untouched."""

from __future__ import annotations

import errno
from types import TracebackType

from upshift.errors import CheckpointError, InUseError, ResumeError

_SPACE = "Free some space; the checkpoints that are there are untouched."


class told:
    """Turns an OSError into a CheckpointError that says what was not done, and puts it before the errors of others."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, (InUseError, ResumeError)):
            return
        if isinstance(error, CheckpointError):
            if not error.message.startswith(self._what):
                raise CheckpointError(f"{self._what}: {error.message}", remedy=error.remedy) from None
        elif isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = _SPACE if full else "Check the folder and its disk; the checkpoints that are there are untouched."
            raise CheckpointError(f"{self._what}: {error.strerror or error}.", remedy=remedy) from None
