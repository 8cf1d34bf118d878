"""Every I/O call of the store, one method each, so that tests can count, kill at, fail or record them.

Two promises rest on these calls: a name in `checkpoints/` stands for complete files, because files and folder are
synced before the rename and the parent after it; and what is read is a regular file below the folder that was meant,
because nothing follows a symbolic link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upshift.checkpoint.manifest import File
from upshift.errors import CheckpointError

#: Bytes handed to one write or read.
CHUNK = 8 * 2**20

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Disk:
    """The real filesystem. Folders are made with mode 0700, files with 0600. Methods raise OSError."""

    def make_folder(self, path: Path) -> None:
        """mkdir."""
        os.mkdir(path, 0o700)

    def create(self, path: Path) -> int:
        """A descriptor of a new file; there must be none of that name."""
        return os.open(path, _NEW, 0o600)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of `data`; how much was written."""
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        """The file's bytes are on the disk when this returns."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """close."""
        os.close(fd)

    def sync_folder(self, path: Path) -> None:
        """The folder's names are on the disk when this returns."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """rename(2): atomic, on one filesystem."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        """unlink."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """rmdir."""
        os.rmdir(path)

    def free(self, path: Path) -> int:
        """Bytes this user may still write there."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def read(self, fd: int, into: memoryview) -> int:
        """Read some bytes; 0 at the end."""
        return os.readv(fd, [into])


class Writer:
    """A new file that is hashed while it is written, and synced at the end."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._hash = hashlib.sha256()
        self._size = 0
        self._fd = disk.create(path)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data` (bytes; a memoryview of format B)."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._hash.update(part)
            self._size += len(part)
            while part:
                written = self._disk.write(self._fd, part)
                if written <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                part = part[written:]

    def finish(self) -> File:
        """Sync and close; what the manifest says about the file."""
        self._disk.sync(self._fd)
        self.close()
        return File(self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._disk.close(fd)


def write_file(disk: Disk, path: Path, data: bytes) -> File:
    """Write a new file and sync it."""
    writer = Writer(disk, path)
    try:
        writer.write(data)
        return writer.finish()
    finally:
        writer.close()


@contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """A descriptor to read the regular file `name` right in `folder`; neither may be a symbolic link.

    Raises:
        CheckpointError: it is a link, a pipe, a folder.
        OSError: it is not there, or cannot be opened.
    """
    try:
        parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Without O_NONBLOCK a named pipe would be waited for.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise CheckpointError(f"{name} is a link or a special file.") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(f"{name} is no regular file.")
        yield fd
    finally:
        os.close(fd)


def small(disk: Disk, folder: Path, name: str, limit: int) -> bytes:
    """All of a small file.

    Raises:
        CheckpointError: it is larger than `limit` bytes, or no regular file.
        OSError: it cannot be read.
    """
    with opened(folder, name) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(f"{name} has {size:,} bytes, more than {limit:,}.")
        data = bytearray(size)
        return bytes(data[: fill(disk, fd, memoryview(data))])


def fill(disk: Disk, fd: int, view: memoryview) -> int:
    """Read until `view` is full or the file ends; how much was read."""
    done = 0
    while done < len(view):
        n = disk.read(fd, view[done : done + CHUNK])
        if n <= 0:
            break
        done += n
    return done


def digest(disk: Disk, fd: int) -> str:
    """SHA-256 over a file from its beginning, read from the disk where the page cache can be left out."""
    os.lseek(fd, 0, os.SEEK_SET)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, max(os.fstat(fd).st_size, 1))))
    while n := disk.read(fd, buffer):
        found.update(buffer[:n])
    os.lseek(fd, 0, os.SEEK_SET)
    return found.hexdigest()


def remove_tree(disk: Disk, path: Path) -> None:
    """Remove a folder and what is in it; links are removed, never followed."""
    with os.scandir(path) as entries:
        found = [(Path(entry.path), entry.is_dir(follow_symlinks=False)) for entry in entries]
    for inner, is_folder in found:
        if is_folder:
            remove_tree(disk, inner)
        else:
            disk.unlink(inner)
    disk.remove_folder(path)


def make_folders(disk: Disk, path: Path) -> None:
    """mkdir -p, each new name synced into its parent."""
    if path.is_dir():
        return
    make_folders(disk, path.parent)
    try:
        disk.make_folder(path)
    except FileExistsError:
        return
    disk.sync_folder(path.parent)
