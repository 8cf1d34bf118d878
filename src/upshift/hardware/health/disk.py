"""Disks: room where things are written, how fast the folder for temporary files is, how many files may be open."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from upshift.hardware.health.check import Check, State
from upshift.hardware.health.system import text_of
from upshift.units import binary, si
from upshift.units import seconds as in_words

#: Bytes of room below which trials fail, and below which caches and checkpoints of two arms may not fit.
LEAST_ROOM, SOME_ROOM = 256 * 2**20, 2 * 2**30
#: Bytes written and read to time a disk, in pieces, within this many seconds in all.
SAMPLE, PIECE, LIMIT = 64 * 2**20, 4 * 2**20, 2.0
#: Bytes per second below which data and checkpoints are waited for.
SLOW_WRITE, SLOW_READ = 50e6, 100e6
#: Open files a training with loader workers easily reaches, and below which it hardly starts.
MANY_FILES, FEW_FILES = 4096, 256


class Room(msgspec.Struct, frozen=True):
    """What is free where `folder` is, or will be. `entries`: files that may still be made, None where there is no
    such limit."""

    folder: str
    free: int
    entries: int | None = None
    writable: bool = True
    kind: str = ""


def room_in(folder: Path, root: Path = Path("/")) -> Room:
    """The room in a folder, or in the nearest one above it that exists.

    Raises:
        OSError: none can be asked.
    """
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    return Room(str(folder), found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None,
                os.access(place, os.W_OK | os.X_OK), kind_of(place, root))  # fmt: skip


def kind_of(folder: Path, root: Path = Path("/")) -> str:
    """The kind of file system (`ext4`, `tmpfs`, `nfs4`) a folder lies on; empty where the system does not say."""
    best, kind = -1, ""
    real = Path(os.path.realpath(folder))
    for line in text_of(root / "proc/self/mounts").splitlines():
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        # Blanks in a path are written as \040.
        mount = Path(parts[1].replace("\\040", " "))
        if real.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), parts[2]
    return kind


def room(name: str, seen: Room, why: str, mend: str, needed: bool = True) -> Check:
    """Whether there is room in a folder.

    Args:
        needed: without it nothing works; else the worst is a note.
    """
    found = f"{binary(seen.free)} free in {seen.folder}" + (f" ({seen.kind})" if seen.kind else "")
    bad: State = "wrong" if needed else "note"
    if not seen.writable:
        return Check(name, bad, f"{seen.folder} cannot be written", why, mend)
    if seen.entries == 0:
        return Check(name, bad, f"{found}, but no file can be added (no inodes left)", why, mend)
    if seen.free < LEAST_ROOM:
        return Check(name, bad, found, why, mend)
    if seen.free < SOME_ROOM:
        return Check(name, "note", found, why, mend)
    return Check(name, "ok", found, why)


class Speed(msgspec.Struct, frozen=True):
    """Bytes per second of one look: `write` to the disk (fsync), `read` back past the page cache where that can be."""

    size: int
    seconds: float
    write: float
    read: float | None
    cached: bool
    """The system would not drop what it had cached: `read` may be that of memory."""


def time_disk(
    folder: Path, size: int = SAMPLE, limit: float = LIMIT, now: Callable[[], float] = time.perf_counter
) -> Speed:
    """Write a file of `size` bytes in pieces, each to the disk, and read it back; what is not done in `limit` seconds
    is left out.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    piece = os.urandom(min(PIECE, size))  # no disk can compress it
    handle, name = tempfile.mkstemp(prefix=".upshift-disk-", dir=folder)
    try:
        began = now()
        done = 0
        while done < size and (not done or now() - began < limit * 0.6):
            os.write(handle, piece)
            os.fsync(handle)
            done += len(piece)
        wrote = now() - began
        cached = True
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            cached = False
        os.lseek(handle, 0, os.SEEK_SET)
        again, got = now(), 0
        while (part := os.read(handle, PIECE)) and now() - began < limit:
            got += len(part)
        took = now() - again
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(name)
    return Speed(done, now() - began, done / max(wrote, 1e-9), got / max(took, 1e-9) if got else None, cached)


def speed(seen: Speed | None, folder: str, kind: str = "", reason: str = "") -> Check:
    """How fast the disk is; `seen` is None, with the `reason`, where it was not measured."""
    name, why = "disk speed", "Data that is read, and checkpoints that are written, wait for it."
    if seen is None:
        return Check(name, "unknown", f"not measured: {reason}", why)
    read = "" if seen.read is None else f", reads {si(seen.read, 'B/s')}"
    found = (
        f"{folder}{f' ({kind})' if kind else ''} writes {si(seen.write, 'B/s')}{read} (measured once, with "
        f"{binary(seen.size)} in {in_words(seen.seconds)})"
    )
    if kind in ("tmpfs", "ramfs"):
        return Check(name, "ok", f"{found}; this is memory, no disk", why)
    if seen.write < SLOW_WRITE or (seen.read is not None and not seen.cached and seen.read < SLOW_READ):
        return Check(name, "note", found, why, "export TMPDIR=/a/folder/on/a/local/disk")
    return Check(name, "ok", found, why)


def open_files(soft: int | None, hard: int | None) -> Check:
    """How many files this process may open: the limit in force, and how far it can be raised. None: no limit."""
    why = "Loader workers pass tensors as open files: 'Too many open files' or 'received 0 items of ancdata' follow."
    found = "no limit" if soft is None else f"{soft} at once" + (f", up to {hard}" if hard not in (None, soft) else "")
    if soft is None or soft >= MANY_FILES:
        return Check("open files", "ok", found, why)
    to = MANY_FILES * 4 if hard is None else min(hard, MANY_FILES * 16)
    mend = f"ulimit -n {to}" if to > soft else "docker run --ulimit nofile=65536    (else: /etc/security/limits.conf)"
    return Check("open files", "wrong" if soft < FEW_FILES else "note", found, why, mend)
