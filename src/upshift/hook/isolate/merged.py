"""The functions of `os` that open, list, create, rename and remove, on the merged view."""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import Any

from upshift.hook.isolate import originals
from upshift.hook.isolate.mirror import Fd, Mirror
from upshift.hook.isolate.originals import error, is_folder, lstat, system


class Files(Mirror):
    """The functions of `os`, by their names; arguments and errors are theirs."""

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Fd = None) -> int:
        """`os.open`."""
        follow = not flags & os.O_NOFOLLOW
        target: str | None
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            target = self.read(path, dir_fd, follow)
        else:
            exclusive = flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT | os.O_EXCL
            found = self.locate(path, dir_fd, follow and not exclusive)
            target = found[0] if found else None
            if found and found[1]:
                name, status = found[0], lstat(self.actual(found[0]))
                if status is not None and exclusive:
                    raise error(errno.EEXIST)
                if status is None and not flags & os.O_CREAT:
                    raise error(errno.ENOTDIR if self._through_file(name) else errno.ENOENT)
                if status is None or stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                    target = self.prepare(name, content=not flags & os.O_TRUNC)
                else:
                    target = self.actual(name)  # named pipes, devices
        if target is None:
            return int(system.open(path, flags, mode, dir_fd=dir_fd))
        return int(system.open(target, flags, mode))

    def unlink(self, path: Any, *, dir_fd: Fd = None, folder: bool = False) -> None:
        """`os.unlink` and, with `folder`, `os.rmdir`."""
        original = system.rmdir if folder else system.unlink
        found = self.locate(path, dir_fd, follow=False)
        if found is None or not found[1]:
            original(*(found[:1] if found else (path,)), **({} if found else {"dir_fd": dir_fd}))
            return
        name = found[0]
        status = lstat(self.actual(name))
        if status is None:
            raise error(errno.ENOTDIR if self._through_file(name) else errno.ENOENT)
        if stat.S_ISDIR(status.st_mode) != folder:
            raise error(errno.ENOTDIR if folder else errno.EISDIR)
        if folder and self.content(name):
            raise error(errno.ENOTEMPTY)
        if lstat(self.root + name) is not None:
            original(self.root + name)
        self.hide(name)

    def rename(self, src: Any, dst: Any, *, src_dir_fd: Fd = None, dst_dir_fd: Fd = None) -> None:
        """`os.rename` and `os.replace`, which are one on Linux."""
        source, target = (
            self.locate(src, src_dir_fd, follow=False),
            self.locate(dst, dst_dir_fd, follow=False),
        )
        if not (source and source[1]) and not (target and target[1]):
            system.rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            return
        if source is None or target is None:  # a device: not to be renamed
            raise error(errno.EXDEV)
        (from_name, from_mirror), (to_name, to_mirror) = source, target
        old = lstat(self.actual(from_name) if from_mirror else from_name)
        new = lstat(self.actual(to_name) if to_mirror else to_name)
        if old is None and self._through_file(from_name):
            raise error(errno.ENOTDIR)
        to_path = to_name
        if to_mirror and (old is not None or self.exists(posixpath.dirname(from_name))):
            to_path = self.place(to_name)
        if old is None:
            raise error(errno.ENOENT)
        if from_name == to_name:
            return
        moving_folder = stat.S_ISDIR(old.st_mode)
        if moving_folder and to_name.startswith(from_name + "/"):
            raise error(errno.EINVAL)
        if from_name.startswith(to_name + "/"):
            raise error(errno.ENOTEMPTY)
        if new is not None:
            if stat.S_ISDIR(new.st_mode) != moving_folder:
                raise error(errno.ENOTDIR if moving_folder else errno.EISDIR)
            if moving_folder and (self.content(to_name) if to_mirror else system.listdir(to_name)):
                raise error(errno.ENOTEMPTY)
        if from_mirror:
            self.copy_tree(from_name)
        self._move(self.root + from_name if from_mirror else from_name, to_path, moving_folder)
        if from_mirror:
            self.hide(from_name)
        if to_mirror:
            # A directory, or a link to one, must not show through what took its place.
            self.hide(to_name)
        self._folders.clear()

    @staticmethod
    def _move(from_path: str, to_path: str, folder: bool) -> None:
        try:
            system.rename(from_path, to_path)
        except OSError as error:
            if error.errno != errno.EXDEV or folder:
                raise
            # Between the mirror and a place written for real: two file systems, which to the script are one.
            with originals.open_file(from_path, "rb") as reader, originals.open_file(to_path, "wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
            system.unlink(from_path)

    def symlink(self, src: Any, dst: Any, target_is_directory: bool = False, *, dir_fd: Fd = None) -> None:
        """`os.symlink`."""
        target = self.new(dst, dir_fd)
        if target is None:
            system.symlink(src, dst, target_is_directory, dir_fd=dir_fd)
        else:
            system.symlink(src, target, target_is_directory)

    def link(
        self,
        src: Any,
        dst: Any,
        *,
        src_dir_fd: Fd = None,
        dst_dir_fd: Fd = None,
        follow_symlinks: bool = True,
    ) -> None:
        """`os.link`."""
        found = self.locate(src, src_dir_fd, follow=False)
        if found is None:
            raise error(errno.EXDEV)  # a device
        name, mirrored = found
        status = lstat(self.actual(name) if mirrored else name)
        if status is None:
            raise error(errno.ENOTDIR if self._through_file(name) else errno.ENOENT)
        target = self.new(dst, dst_dir_fd)
        if stat.S_ISDIR(status.st_mode):
            raise error(errno.EPERM)
        system.link(self.prepare(name) if mirrored else name, dst if target is None else target)

    def chdir(self, path: Any) -> None:
        """`os.chdir` and `os.fchdir`."""
        text = self.absolute(path)
        if text is None:
            system.chdir(path)
            self.cwd = self.absolute(system.getcwd()) or "/"
            return
        name = self.canonical(text)
        # Where it exists for real, native code and children must find its other files.
        plain = self._device(text) or self.passes(name) or (is_folder(name) and not self.gone(name))
        system.chdir(name if plain else self.actual(name))
        self.cwd = name

    def listdir(self, path: Any = None) -> list[Any]:
        """`os.listdir`."""
        listed: list[Any]
        given = "." if path is None else path
        target = self.read(given)
        if target is None:
            listed = system.listdir(path)
            return listed
        names = self.names(self.canonical(self.absolute(given) or "/"))
        listed = system.listdir(target) if names is None else names
        return [os.fsencode(name) for name in listed] if isinstance(path, bytes) else listed

    def scandir(self, path: Any = None) -> Any:
        """`os.scandir`."""
        given = "." if path is None else path if isinstance(path, int) else os.fspath(path)
        target = self.read(given)
        if target is None:
            return system.scandir(given)
        if self.names(self.canonical(self.absolute(given) or "/")) is None:
            try:
                plain = posixpath.samestat(system.stat(given), system.stat(target))
            except OSError:
                plain = False
            if plain:
                return system.scandir(given)
        return _Scan(given, self.listdir(given))


class _Entry:
    """What `os.DirEntry` is to a directory of the merged view."""

    def __init__(self, folder: Any, name: Any) -> None:
        self.name = name
        self.path = os.path.join(folder, name)

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat(self.path, follow_symlinks=follow_symlinks)

    def inode(self) -> int:
        return self.stat(follow_symlinks=False).st_ino

    def _is(self, kind: Callable[[int], bool], follow: bool) -> bool:
        try:
            return kind(self.stat(follow_symlinks=follow).st_mode)
        except FileNotFoundError:
            return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(stat.S_ISDIR, follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(stat.S_ISREG, follow_symlinks)

    def is_symlink(self) -> bool:
        return self._is(stat.S_ISLNK, False)

    def is_junction(self) -> bool:
        return False


class _Scan:
    """What `os.scandir` returns, for a directory of the merged view."""

    def __init__(self, folder: Any, names: list[Any]) -> None:
        self._entries: Iterator[_Entry] = (_Entry(folder, name) for name in names)

    def __iter__(self) -> _Scan:
        return self

    def __next__(self) -> _Entry:
        return next(self._entries)

    def __enter__(self) -> _Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the remaining entries."""
        self._entries = iter(())
