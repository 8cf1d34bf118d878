"""Who owns a run folder: an exclusive flock, and the attempt number as fencing token.

The lock ends with its process, however that ends. Where a filesystem only pretends to lock, the token still stands:
each owner takes the next number, all its checkpoints bear it, and an owner that finds a higher number than its own
stops (Kleppmann, "How to do distributed locking", 2016).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import msgspec

from upshift.checkpoint import disk as io
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.manifest import parse_name
from upshift.errors import CheckpointError, InUseError

LOCK = "lock"
ATTEMPT = "attempt.json"

_MAX_BYTES = 4096
#: Locks this process holds, whether or not anybody still refers to them.
_held: set[Lock] = set()


class Attempt(msgspec.Struct, frozen=True):
    """The newest owner, as attempt.json tells it. `since` is wall time, for people."""

    attempt: int
    pid: int = 0
    host: str = ""
    since: str = ""


class Lock:
    """The lock of one `checkpoints/` folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk
        self._fd = -1
        self.attempt = 0

    @property
    def held(self) -> bool:
        """Whether this process owns the folder."""
        return self._fd >= 0

    def take(self) -> None:
        """Lock the folder, then take the next attempt number; the loser has changed nothing.

        Raises:
            InUseError: another process owns it (told at once, without waiting).
            CheckpointError: this filesystem has no locks.
            OSError: the folder cannot be written.
        """
        fd = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._in_use() from None
            raise CheckpointError(
                f"{self._folder} cannot be locked: {error.strerror}.",
                remedy="Name a folder on a filesystem with flock.",
            ) from None
        self._fd = fd
        _held.add(self)
        try:
            self._next_attempt()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder back."""
        fd, self._fd = self._fd, -1
        _held.discard(self)
        if fd >= 0:
            os.close(fd)

    def check(self) -> None:
        """Raises InUseError when a newer attempt has taken the folder, or this process does not own it."""
        newest = self.newest()
        if not self.held or (newest is not None and newest.attempt > self.attempt):
            raise self._in_use()

    def newest(self) -> Attempt | None:
        """The newest owner; None where the file is missing or damaged."""
        try:
            return msgspec.json.decode(io.small(self._disk, self._folder, ATTEMPT, _MAX_BYTES), type=Attempt)
        except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError, CheckpointError):
            return None

    def _next_attempt(self) -> None:
        # Names count, too: a number is not used twice even where the file was lost.
        used = [newest.attempt] if (newest := self.newest()) and 0 <= newest.attempt < 10**9 else []
        for folder in (self._folder, self._folder / "quarantine"):
            try:
                used += [parts[1] for name in os.listdir(folder) if (parts := parse_name(name.removeprefix(".trash-")))]
            except FileNotFoundError:
                pass
        self.attempt = max(used, default=0) + 1
        record = Attempt(self.attempt, os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
        temporary = self._folder / f".tmp-attempt-{self.attempt}-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        io.write_file(self._disk, temporary, msgspec.json.encode(record))
        self._disk.rename(temporary, self._folder / ATTEMPT)
        self._disk.sync_folder(self._folder)

    def _in_use(self) -> InUseError:
        owner = self.newest()
        by = f"process {owner.pid} on {owner.host!r:.60} since {owner.since:.30}" if owner else "another process"
        return InUseError(
            f"the run folder {self._folder.parent} is in use by {by}.",
            remedy="Wait for that run, or name another folder with --out.",
        )


def _forked() -> None:
    # A loader worker that outlives its trainer would keep the lock: it shares the descriptor.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forked)
