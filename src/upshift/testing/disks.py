"""Disks that fail on purpose: killed at a call, full, broken, or recorded so that a power loss can be played back."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from upshift.checkpoint.disk import Disk

#: The calls that change the disk.
CHANGES = ("make_folder", "create", "write", "sync", "close", "sync_folder", "rename", "unlink", "remove_folder")


class WatchedDisk(Disk):
    """Calls `before(n, name, subject)` before the n-th changing call (from 1), with its path or descriptor."""

    def __init__(self, before: Callable[[int, str, object], None] = lambda n, name, subject: None) -> None:
        self.calls = 0
        self._before = before

    def _count(self, name: str, subject: object) -> None:
        self.calls += 1
        self._before(self.calls, name, subject)

    def make_folder(self, path: Path) -> None:
        self._count("make_folder", path)
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._count("create", path)
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._count("write", fd)
        return super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._count("sync", fd)
        super().sync(fd)

    def close(self, fd: int) -> None:
        self._count("close", fd)
        super().close(fd)

    def sync_folder(self, path: Path) -> None:
        self._count("sync_folder", path)
        super().sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._count("rename", old)
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self._count("unlink", path)
        super().unlink(path)

    def remove_folder(self, path: Path) -> None:
        self._count("remove_folder", path)
        super().remove_folder(path)


def killed_at(n: int) -> WatchedDisk:
    """A disk whose process is killed (SIGKILL) before its n-th changing call."""

    def before(call: int, name: str, subject: object) -> None:
        if call == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return WatchedDisk(before)


def failing(names: tuple[str, ...], number: int = errno.EIO, after: int = 0) -> WatchedDisk:
    """A disk whose calls of these names raise OSError(number), once `after` of them have gone well."""
    seen = 0

    def before(call: int, name: str, subject: object) -> None:
        nonlocal seen
        if name in names:
            seen += 1
            if seen > after:
                raise OSError(number, os.strerror(number))

    return WatchedDisk(before)


class ShortDisk(Disk):
    """A disk that writes and reads at most `most` bytes a call."""

    def __init__(self, most: int) -> None:
        self._most = most

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, data[: self._most])

    def read(self, fd: int, into: memoryview) -> int:
        return super().read(fd, into[: self._most])


# -- power loss -------------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """An inode: `durable` is what a sync has made certain, `pending` the writes (offset, data) since."""

    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True)
class _Change:
    """A change of names: `old` None for a new file or folder, `new` None for a removed one."""

    old: str | None
    new: str | None
    node: _File | None
    """The file of a new name; None for a folder, and for names that move or go."""


@dataclass(frozen=True)
class _Write:
    node: _File
    offset: int
    data: bytes


class RecordingDisk(Disk):
    """Records every change under `root`, so that `states` can say what a power loss might leave.

    The model is weaker than any common filesystem: bytes are certain after the file's sync only, a name after the sync
    of its folder only, and of the rest any part may have reached the disk, in any order; a write may be torn.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._open: dict[int, _File] = {}
        self.log: list[tuple[str, object]] = []

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.log.append(("change", _Change(None, str(path), None)))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._open[fd] = _File()
        self.log.append(("change", _Change(None, str(path), self._open[fd])))
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        written = super().write(fd, data)
        node = self._open[fd]
        self.log.append(("write", _Write(node, node.size, bytes(data[:written]))))
        node.size += written
        return written

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.log.append(("sync", self._open[fd]))

    def close(self, fd: int) -> None:
        super().close(fd)
        self._open.pop(fd, None)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.log.append(("sync_folder", str(path)))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.log.append(("change", _Change(str(old), str(new), None)))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.log.append(("change", _Change(str(path), None, None)))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.log.append(("change", _Change(str(path), None, None)))

    def mark(self, what: object) -> None:
        """Note a moment of the program, such as a checkpoint it was told is durable."""
        self.log.append(("mark", what))

    def states(self, seed: int) -> Iterator[tuple[list[object], Callable[[Path], None]]]:
        """Crash states without end: the marks before the crash, and a function that builds the disk below a folder."""
        rng = random.Random(seed)
        while True:
            at = rng.randrange(1, len(self.log) + 1)
            # None of the unsynced, all of it, or a part.
            share = rng.choice((0.0, 1.0, 0.5, 0.9, 0.1))
            marks = [subject for kind, subject in self.log[:at] if kind == "mark"]
            yield marks, _Crash(self._root, self.log[:at], share, random.Random(rng.random())).build


class _Crash:
    """One state: what is certain, and of the rest what chance has written."""

    def __init__(self, root: str, log: list[tuple[str, object]], share: float, rng: random.Random) -> None:
        self._root, self._log, self._share, self._rng = root, log, share, rng

    def build(self, target: Path) -> None:
        contents: dict[int, tuple[bytes, list[tuple[int, bytes]]]] = {}
        names = self._names(contents)
        folders = {self._root}
        for path in sorted(names):
            if os.path.dirname(path) not in folders:
                continue  # the folder it is in did not survive
            place = target / os.path.relpath(path, self._root)
            node = names[path]
            if node is None:
                folders.add(path)
                place.mkdir()
            else:
                place.write_bytes(self._bytes(*contents.get(id(node), (b"", []))))

    def _names(self, contents: dict[int, tuple[bytes, list[tuple[int, bytes]]]]) -> dict[str, _File | None]:
        pending: list[_Change] = []
        names: dict[str, _File | None] = {}
        for kind, subject in self._log:
            if kind == "change":
                assert isinstance(subject, _Change)
                pending.append(subject)
            elif kind == "sync_folder":
                # All earlier changes of names in that folder are certain; what they rest on is, too.
                for change in [c for c in pending if subject in _folders(c)]:
                    _apply(names, change, certain=True)
                pending = [c for c in pending if subject not in _folders(c)]
            elif kind == "write":
                assert isinstance(subject, _Write)
                durable, writes = contents.get(id(subject.node), (b"", []))
                contents[id(subject.node)] = (durable, [*writes, (subject.offset, subject.data)])
            elif kind == "sync":
                durable, writes = contents.get(id(subject), (b"", []))
                contents[id(subject)] = (_written(durable, writes), [])
        for change in pending:
            if self._rng.random() < self._share:
                _apply(names, change, certain=False)
        return names

    def _bytes(self, durable: bytes, writes: list[tuple[int, bytes]]) -> bytes:
        kept = []
        for offset, data in writes:
            if self._rng.random() < self._share:
                torn = self._rng.random() < 0.3
                kept.append((offset, data[: self._rng.randrange(len(data) + 1)] if torn else data))
        return _written(durable, kept)


def _folders(change: _Change) -> set[str]:
    return {os.path.dirname(path) for path in (change.old, change.new) if path is not None}


def _apply(names: dict[str, _File | None], change: _Change, *, certain: bool) -> None:
    if change.old is None:
        assert change.new is not None
        names[change.new] = change.node
        return
    if change.old not in names:
        return  # what it names did not survive
    moved = {path: node for path, node in names.items() if path == change.old or path.startswith(f"{change.old}/")}
    if change.new is None:
        if len(moved) > 1 and not certain:
            return  # a folder that is not empty cannot go
        for path in moved:
            del names[path]
        return
    for path, node in moved.items():
        del names[path]
        names[change.new + path[len(change.old) :]] = node


def _written(durable: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    found = bytearray(durable)
    for offset, data in writes:
        if len(found) < offset:
            found.extend(bytes(offset - len(found)))
        found[offset : offset + len(data)] = data
    return bytes(found)
