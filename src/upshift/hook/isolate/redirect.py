"""Rung 3: writes through Python go to a mirror of the file system below the scratch folder.

The functions of `os`, `open` and the few libraries that write from C++ or Rust get paths that point into
`<scratch>/mirror/<absolute path>` once something there was written, copied for appending, or created. What
was removed is remembered below `<scratch>/gone` and never removed for real. All state is on disk, so that
forked processes (data-loader workers, multiprocessing) see each other's writes.

Terms used below: a *logical* path is what the script means; it is *canonical* when absolute and free of
symbolic links in the merged view; its *actual* path is where its content lies, in the mirror or for real.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import posixpath
import shutil
import stat
import sys
import tempfile
import types
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from upshift.hook.imports import AfterImport

_REAL = ("/dev/", "/proc/", "/sys/")
_LINKS_MAX = 40
_Fd = int | None

# The functions of `os` as they were, for our own use.
_os = types.SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))})
_open = io.open


def _lstat(path: str) -> os.stat_result | None:
    try:
        status: os.stat_result = _os.lstat(path)
    except OSError:
        return None
    return status


def _error(code: int) -> OSError:
    """The exception of an errno; whoever knows the script's argument adds the file name."""
    return OSError(code, os.strerror(code), "")


def _is_folder(path: str) -> bool:
    status = _lstat(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _remove_tree(path: str) -> None:
    """`shutil.rmtree` on actual paths."""
    for name in _os.listdir(path):
        inner = f"{path}/{name}"
        if _is_folder(inner):
            _remove_tree(inner)
        else:
            _os.unlink(inner)
    _os.rmdir(path)


class Mirror:
    """The merged view of the real file system and of what was written instead of to it.

    Args:
        scratch: real path of the directory to hold `mirror` and `gone`.
        keep: real paths that are written for real.
        protect: real paths in /dev, the rest of which is written for real, that are mirrored all the same.
        wants: if given, only canonical paths for which it is true are mirrored.
    """

    def __init__(
        self,
        scratch: str,
        keep: Sequence[str],
        protect: Sequence[str] = (),
        wants: Callable[[str], bool] | None = None,
    ) -> None:
        self.root = f"{scratch}/mirror"
        self.hidden = f"{scratch}/gone"
        self.cwd: str = _os.getcwd()
        self._real = (scratch, *keep)
        self._protected = tuple(protect)
        self._wants = wants
        self._folders: dict[str, str] = {}
        for path in (self.root, self.hidden):
            _os.makedirs(path, exist_ok=True)

    # -- paths -------------------------------------------------------------------------------------------

    def passes(self, path: str) -> bool:
        """Whether writes to `path` are real."""
        return any(path == real or path.startswith(real + "/") for real in self._real) or self._device(path)

    def _device(self, path: str) -> bool:
        """Whether a path is a device, or one of the links of /proc that lead to no path."""
        if not path.startswith(_REAL) or ".." in path:
            return False
        return not any(path == inside or path.startswith(inside + "/") for inside in self._protected)

    def absolute(self, path: Any, dir_fd: _Fd = None) -> str | None:
        """The logical path of an argument of an `os` function; None if it is a descriptor or no path."""
        if isinstance(path, int):
            return None
        try:
            text = os.fsdecode(path)
        except (TypeError, ValueError):
            return None
        if "\0" in text or not text:
            return None
        if not text.startswith("/"):
            base = self.cwd if dir_fd is None else _os.readlink(f"/proc/self/fd/{dir_fd}")
            text = f"{base}/{text}"
        if text == self.root or text.startswith(self.root + "/"):
            text = text[len(self.root) :] or "/"
        return text

    def canonical(self, path: str, follow: bool = True) -> str:
        """Resolve symbolic links (of the last component too if `follow`) and dots in an absolute path.

        Raises:
            OSError: a loop of links (ELOOP).
        """
        head, _, name = path.rpartition("/")
        if name in ("", ".", ".."):
            return self._resolve(path, follow)
        folder = self._folders.get(head)
        if folder is None:
            folder = self._folders[head] = self._resolve(head, True)
        here = (folder if folder != "/" else "") + "/" + name
        return self._resolve(here, True) if follow and self._link(here) is not None else here

    def _resolve(self, path: str, follow: bool) -> str:
        done = ""
        left = _LINKS_MAX
        todo = [part for part in path.split("/") if part not in ("", ".")][::-1]
        while todo:
            part = todo.pop()
            if part == "..":
                done = done.rpartition("/")[0]
                continue
            here = f"{done}/{part}"
            target = self._link(here) if todo or follow else None
            if target is None:
                done = here
                continue
            left -= 1
            if left < 0:
                raise _error(errno.ELOOP)
            if target.startswith("/"):
                done = ""
            todo += [part for part in target.split("/") if part not in ("", ".")][::-1]
        return done or "/"

    def _link(self, path: str) -> str | None:
        actual = self.actual(path)
        status = _lstat(actual)
        if status is None or not stat.S_ISLNK(status.st_mode):
            return None
        target: str = _os.readlink(actual)
        return target

    def actual(self, path: str) -> str:
        """Where the content of a canonical path lies; a path that does not exist if it was removed."""
        mirrored = self.root + path
        # Asking first whether its folder is there spares most reads an exception.
        if _os.access(posixpath.dirname(mirrored), os.F_OK) and _lstat(mirrored) is not None:
            return mirrored
        return mirrored if self.gone(path) else path

    def gone(self, path: str) -> bool:
        """Whether the real entry at a canonical path, or a directory above it, was removed."""
        here = self.hidden
        for part in path.split("/")[1:]:
            here = f"{here}/{part}"
            if not _os.access(here, os.F_OK):
                return False
            if not _is_folder(here):
                return True
        return False

    def exists(self, path: str) -> bool:
        """Whether a canonical path exists in the merged view, be it a dangling link."""
        return _lstat(self.actual(path)) is not None

    # -- changes -----------------------------------------------------------------------------------------

    def read(self, path: Any, dir_fd: _Fd = None, follow: bool = True) -> str | None:
        """The actual path to read from; None for arguments to leave as they are."""
        text = self.absolute(path, dir_fd)
        if text is None or self._device(text):
            return None
        name = self.canonical(text, follow)
        return name if self.passes(name) else self.actual(name)

    def locate(self, path: Any, dir_fd: _Fd = None, follow: bool = True) -> tuple[str, bool] | None:
        """The canonical path to write to and whether it is mirrored; None for arguments to leave alone."""
        text = self.absolute(path, dir_fd)
        if text is None or self._device(text):
            return None
        name = self.canonical(text, follow)
        if self.passes(name):
            return name, False
        if self._wants is None or self._wants(name):
            return name, True
        return name, _lstat(self.root + name) is not None or self.gone(name)

    def write(self, path: Any, dir_fd: _Fd = None, follow: bool = True) -> str | None:
        """The actual path to change in place, after copying the file there; None as for `read`."""
        found = self.locate(path, dir_fd, follow)
        if found is None:
            return None
        return self.prepare(found[0]) if found[1] else found[0]

    def place(self, name: str) -> str:
        """Where a canonical path goes in the mirror, its folder made.

        Raises:
            OSError: the folder does not exist (ENOENT) or is none (ENOTDIR).
        """
        folder = posixpath.dirname(name)
        status = _lstat(self.actual(folder))
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise _error(errno.ENOENT if status is None and not self._through_file(folder) else errno.ENOTDIR)
        self._make(folder)
        return self.root + name

    def _through_file(self, path: str) -> bool:
        """Whether a directory above `path` is something else."""
        while path != "/":
            path = posixpath.dirname(path)
            status = _lstat(self.actual(path))
            if status is not None:
                return not stat.S_ISDIR(status.st_mode)
        return False

    def prepare(self, name: str, content: bool = True) -> str:
        """Make a canonical path writable in the mirror: a place and a copy of the real file, with its mode.

        Raises:
            OSError: as for `place`.
        """
        target = self.place(name)
        if _lstat(target) is None and not self.gone(name):
            self._copy_up(name, content)
        return target

    def _make(self, folder: str) -> None:
        if folder == "/" or _lstat(self.root + folder) is not None:
            return
        self._make(posixpath.dirname(folder))
        status = _os.stat(folder)
        _os.mkdir(self.root + folder)
        _os.chmod(self.root + folder, stat.S_IMODE(status.st_mode) | 0o700)
        _os.utime(self.root + folder, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _copy_up(self, name: str, content: bool) -> None:
        status = _lstat(name)
        if status is None:
            return
        target = self.root + name
        if stat.S_ISLNK(status.st_mode):
            _os.symlink(_os.readlink(name), target)
        elif stat.S_ISDIR(status.st_mode):
            self._make(name)
        elif stat.S_ISREG(status.st_mode):
            with _open(target, "wb") as copy:
                if content:
                    with _open(name, "rb") as source:
                        shutil.copyfileobj(source, copy, 1 << 20)
            _os.chmod(target, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)
            _os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def copy_tree(self, name: str) -> None:
        """Bring all of a canonical path into the mirror, before it is renamed."""
        self.prepare(name)
        if _is_folder(self.root + name):
            for inner in self.names(name) or ():
                self.copy_tree(f"{name}/{inner}")

    def hide(self, name: str) -> None:
        """Remember that the real entry at a canonical path is no longer there; nothing if there is none."""
        self._folders.clear()
        if self.gone(name) or _lstat(name) is None:
            return
        mark = self.hidden + name
        if _is_folder(mark):
            _remove_tree(mark)
        _os.makedirs(posixpath.dirname(mark), exist_ok=True)
        with _open(mark, "wb"):
            pass

    def new(self, path: Any, dir_fd: _Fd = None) -> str | None:
        """The actual path of an entry to create; None as for `read`.

        Raises:
            OSError: it exists already (EEXIST), or as for `place`.
        """
        found = self.locate(path, dir_fd, follow=False)
        if found is None or not found[1]:
            return found[0] if found else None
        if self.exists(found[0]):
            raise _error(errno.EEXIST)
        self._folders.clear()
        return self.place(found[0])

    def names(self, name: str) -> list[str] | None:
        """What a canonical directory holds in the merged view; None if that is just its actual content."""
        mirrored = _is_folder(self.root + name)
        if not mirrored and not _is_folder(self.hidden + name):
            return None
        found = set(_os.listdir(self.root + name)) if mirrored else set()
        if not self.gone(name) and _is_folder(name):
            for inner in _os.listdir(name):
                mark = _lstat(f"{self.hidden}{name}/{inner}")
                if mark is None or stat.S_ISDIR(mark.st_mode):
                    found.add(inner)
        return sorted(found)

    def content(self, name: str) -> list[str]:
        """What a canonical directory holds in the merged view."""
        names = self.names(name)
        listed: list[str] = _os.listdir(self.actual(name)) if names is None else names
        return listed

    # -- the functions of os -----------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: _Fd = None) -> int:
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
                name, status = found[0], _lstat(self.actual(found[0]))
                if status is not None and exclusive:
                    raise _error(errno.EEXIST)
                if status is None and not flags & os.O_CREAT:
                    raise _error(errno.ENOTDIR if self._through_file(name) else errno.ENOENT)
                if status is None or stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                    target = self.prepare(name, content=not flags & os.O_TRUNC)
                else:
                    target = self.actual(name)  # named pipes, devices
        if target is None:
            return int(_os.open(path, flags, mode, dir_fd=dir_fd))
        return int(_os.open(target, flags, mode))

    def unlink(self, path: Any, *, dir_fd: _Fd = None, folder: bool = False) -> None:
        """`os.unlink` and, with `folder`, `os.rmdir`."""
        original = _os.rmdir if folder else _os.unlink
        found = self.locate(path, dir_fd, follow=False)
        if found is None or not found[1]:
            original(*(found[:1] if found else (path,)), **({} if found else {"dir_fd": dir_fd}))
            return
        name = found[0]
        status = _lstat(self.actual(name))
        if status is None:
            raise _error(errno.ENOTDIR if self._through_file(name) else errno.ENOENT)
        if stat.S_ISDIR(status.st_mode) != folder:
            raise _error(errno.ENOTDIR if folder else errno.EISDIR)
        if folder and self.content(name):
            raise _error(errno.ENOTEMPTY)
        if _lstat(self.root + name) is not None:
            original(self.root + name)
        self.hide(name)

    def rename(self, src: Any, dst: Any, *, src_dir_fd: _Fd = None, dst_dir_fd: _Fd = None) -> None:
        """`os.rename` and `os.replace`, which are one on Linux."""
        source, target = (
            self.locate(src, src_dir_fd, follow=False),
            self.locate(dst, dst_dir_fd, follow=False),
        )
        if not (source and source[1]) and not (target and target[1]):
            _os.rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            return
        if source is None or target is None:  # a device: not to be renamed
            raise _error(errno.EXDEV)
        (from_name, from_mirror), (to_name, to_mirror) = source, target
        old = _lstat(self.actual(from_name) if from_mirror else from_name)
        new = _lstat(self.actual(to_name) if to_mirror else to_name)
        if old is None and self._through_file(from_name):
            raise _error(errno.ENOTDIR)
        to_path = to_name
        if to_mirror and (old is not None or self.exists(posixpath.dirname(from_name))):
            to_path = self.place(to_name)
        if old is None:
            raise _error(errno.ENOENT)
        if from_name == to_name:
            return
        moving_folder = stat.S_ISDIR(old.st_mode)
        if moving_folder and to_name.startswith(from_name + "/"):
            raise _error(errno.EINVAL)
        if from_name.startswith(to_name + "/"):
            raise _error(errno.ENOTEMPTY)
        if new is not None:
            if stat.S_ISDIR(new.st_mode) != moving_folder:
                raise _error(errno.ENOTDIR if moving_folder else errno.EISDIR)
            if moving_folder and (self.content(to_name) if to_mirror else _os.listdir(to_name)):
                raise _error(errno.ENOTEMPTY)
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
            _os.rename(from_path, to_path)
        except OSError as error:
            if error.errno != errno.EXDEV or folder:
                raise
            # Between the mirror and a place written for real: two file systems, which to the script are one.
            with _open(from_path, "rb") as reader, _open(to_path, "wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
            _os.unlink(from_path)

    def symlink(self, src: Any, dst: Any, target_is_directory: bool = False, *, dir_fd: _Fd = None) -> None:
        """`os.symlink`."""
        target = self.new(dst, dir_fd)
        if target is None:
            _os.symlink(src, dst, target_is_directory, dir_fd=dir_fd)
        else:
            _os.symlink(src, target, target_is_directory)

    def link(
        self,
        src: Any,
        dst: Any,
        *,
        src_dir_fd: _Fd = None,
        dst_dir_fd: _Fd = None,
        follow_symlinks: bool = True,
    ) -> None:
        """`os.link`."""
        found = self.locate(src, src_dir_fd, follow=False)
        if found is None:
            raise _error(errno.EXDEV)  # a device
        name, mirrored = found
        status = _lstat(self.actual(name) if mirrored else name)
        if status is None:
            raise _error(errno.ENOTDIR if self._through_file(name) else errno.ENOENT)
        target = self.new(dst, dst_dir_fd)
        if stat.S_ISDIR(status.st_mode):
            raise _error(errno.EPERM)
        _os.link(self.prepare(name) if mirrored else name, dst if target is None else target)

    def chdir(self, path: Any) -> None:
        """`os.chdir` and `os.fchdir`."""
        text = self.absolute(path)
        if text is None:
            _os.chdir(path)
            self.cwd = self.absolute(_os.getcwd()) or "/"
            return
        name = self.canonical(text)
        # Where it exists for real, native code and children must find its other files.
        plain = self._device(text) or self.passes(name) or (_is_folder(name) and not self.gone(name))
        _os.chdir(name if plain else self.actual(name))
        self.cwd = name

    def listdir(self, path: Any = None) -> list[Any]:
        """`os.listdir`."""
        listed: list[Any]
        given = "." if path is None else path
        target = self.read(given)
        if target is None:
            listed = _os.listdir(path)
            return listed
        names = self.names(self.canonical(self.absolute(given) or "/"))
        listed = _os.listdir(target) if names is None else names
        return [os.fsencode(name) for name in listed] if isinstance(path, bytes) else listed

    def scandir(self, path: Any = None) -> Any:
        """`os.scandir`."""
        given = "." if path is None else path if isinstance(path, int) else os.fspath(path)
        target = self.read(given)
        if target is None:
            return _os.scandir(given)
        if self.names(self.canonical(self.absolute(given) or "/")) is None:
            try:
                plain = posixpath.samestat(_os.stat(given), _os.stat(target))
            except OSError:
                plain = False
            if plain:
                return _os.scandir(given)
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


def _named(original: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the name of `original`, and errors that name the path the script gave."""

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except OSError as error:
            if arguments and error.filename is not None:
                error.filename = arguments[0]
                if len(arguments) > 1 and original in (_os.rename, _os.replace, _os.link, _os.symlink):
                    error.filename2 = arguments[1]
            raise

    call.__module__ = "os"  # where pickle shall look for it
    return call


def _functions(mirror: Mirror) -> dict[str, Callable[..., Any]]:
    """Replacements for functions of `os`, by name."""

    def mapped(name: str, where: Callable[..., str | None], **fixed: bool) -> Callable[..., Any]:
        original = getattr(_os, name)

        def function(path: Any, *arguments: Any, dir_fd: _Fd = None, **options: Any) -> Any:
            follow = fixed if "follow_symlinks" not in options else {"follow": options["follow_symlinks"]}
            target = where(path, dir_fd, **follow)
            if target is None:
                return original(path, *arguments, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))
            return original(target, *arguments, **options)

        return function

    def unlink(path: Any, *, dir_fd: _Fd = None) -> None:
        mirror.unlink(path, dir_fd=dir_fd)

    def rmdir(path: Any, *, dir_fd: _Fd = None) -> None:
        mirror.unlink(path, dir_fd=dir_fd, folder=True)

    found: dict[str, Callable[..., Any]] = {
        "open": mirror.open,
        "unlink": unlink,
        "remove": unlink,
        "rmdir": rmdir,
        "rename": mirror.rename,
        "replace": mirror.rename,
        "symlink": mirror.symlink,
        "link": mirror.link,
        "chdir": mirror.chdir,
        "fchdir": mirror.chdir,
        "listdir": mirror.listdir,
        "scandir": mirror.scandir,
        "getcwd": lambda: mirror.cwd,
        "getcwdb": lambda: os.fsencode(mirror.cwd),
        "lstat": mapped("lstat", mirror.read, follow=False),
        "readlink": mapped("readlink", mirror.read, follow=False),
        "lchown": mapped("lchown", mirror.write, follow=False),
    }
    for name in ("stat", "access", "listxattr", "getxattr", "statvfs", "pathconf"):
        found[name] = mapped(name, mirror.read)
    access = found["access"]

    def may(*arguments: Any, **options: Any) -> bool:
        try:
            return bool(access(*arguments, **options))
        except OSError:  # a loop of links
            return False

    found["access"] = may
    for name in ("chmod", "chown", "utime", "truncate", "setxattr", "removexattr"):
        found[name] = mapped(name, mirror.write)
    for name in ("mkdir", "mkfifo", "mknod"):
        found[name] = mapped(name, mirror.new)
    return {name: _named(getattr(_os, name), function) for name, function in found.items()}


def _open_for(mirror: Mirror) -> Callable[..., Any]:
    """A replacement for `open`, mapping through an opener: the file's name stays the one asked for."""

    def through(path: Any, flags: int) -> int:
        return os.open(path, flags, 0o666)

    @functools.wraps(_open)
    def replacement(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if opener is None and mirror.absolute(file) is not None:
            opener = through
        return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)

    replacement.__module__ = "io"
    return replacement


def _sqlite(mirror: Mirror, module: types.ModuleType) -> None:
    connect = module.connect

    def place(path: Any, writing: bool) -> Any:
        if not writing:
            return mirror.read(path) or path
        for suffix in ("-wal", "-journal"):
            if os.path.exists(os.fsdecode(path) + suffix):
                mirror.write(os.fsdecode(path) + suffix)
        return _writable(mirror, path, content=True) or path

    @functools.wraps(connect)
    def replacement(database: Any, *arguments: Any, **options: Any) -> Any:
        text = os.fsdecode(database)
        if text.startswith("file:") and options.get("uri", arguments[6] if len(arguments) > 6 else False):
            location, _, query = text[len("file:") :].partition("?")
            if "mode=memory" not in query and location not in ("", ":memory:"):
                path = urllib.parse.unquote(location.removeprefix("//localhost"))
                path = path[2:] if path.startswith("///") else path
                writing = "mode=ro" not in query and "immutable=1" not in query
                database = f"file:{urllib.parse.quote(place(path, writing))}" + (f"?{query}" if query else "")
        elif text not in ("", ":memory:"):
            database = place(database, True)
        return connect(database, *arguments, **options)

    _set(module, "connect", replacement)


def _set(module: types.ModuleType, name: str, replacement: Any) -> None:
    """Replace a function in its module and in those that re-export it and were imported before us."""
    original = vars(module)[name]
    for other in (module, *map(sys.modules.get, ("sqlite3", "torch", "torch.jit", "safetensors.torch"))):
        if other is not None and vars(other).get(name) is original:
            setattr(other, name, replacement)


_Where = Callable[[Any], str | None]


def _wrap(module: types.ModuleType, name: str, position: int, keyword: str, where: _Where) -> None:
    """Map one path argument of a function of a module that opens files itself."""
    original = getattr(module, name, None)
    if original is None:
        return

    @functools.wraps(original, updated=())
    def replacement(*arguments: Any, **options: Any) -> Any:
        path = arguments[position] if len(arguments) > position else options.get(keyword)
        if isinstance(path, (str, os.PathLike)):
            target = where(path) or path
            if len(arguments) > position:
                arguments = (*arguments[:position], target, *arguments[position + 1 :])
            else:
                options[keyword] = target
        return original(*arguments, **options)

    _set(module, name, replacement)


def _writable(mirror: Mirror, path: Any, content: bool) -> str | None:
    """Like `Mirror.write`, but where nothing can be written the path fails when used.

    The real file is copied only if `content`.
    """
    found = mirror.locate(path)
    if found is None or not found[1]:
        return found[0] if found else None
    try:
        return mirror.prepare(found[0], content)
    except OSError:
        return mirror.root + found[0]


def _libraries(mirror: Mirror) -> None:
    """Map the paths that torch, safetensors and sqlite3 open in C++, Rust or C, once they are imported."""
    write: _Where = functools.partial(_writable, mirror, content=False)

    def torch(module: types.ModuleType) -> None:
        _wrap(module, "save", 1, "f", write)
        _wrap(module, "load", 0, "f", mirror.read)

    def safetensors(module: types.ModuleType) -> None:
        _wrap(module, "serialize_file", 1, "filename", write)
        _wrap(module, "safe_open", 0, "filename", mirror.read)

    after = AfterImport()
    after.on("torch.serialization", torch)
    after.on("torch.jit._serialization", torch)
    after.on("safetensors", safetensors)
    after.on("sqlite3.dbapi2", functools.partial(_sqlite, mirror))


def _elsewhere(replaced: dict[int, Any]) -> None:
    """Replace the functions in the modules that took them by name before us (`from os import rename`)."""
    skip = {
        "os",
        "posix",
        "_io",
        "io",
        "builtins",
        __name__,
        "importlib._bootstrap",
        "importlib._bootstrap_external",
    }
    for name, module in list(sys.modules.items()):
        if name in skip or not isinstance(module, types.ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, attribute, replaced[id(value)])
    # pathlib of Python 3.13 and later lists through a class that took scandir by name.
    globber = getattr(sys.modules.get("glob"), "_StringGlobber", None)
    if globber is not None and "scandir" in vars(globber):
        globber.scandir = staticmethod(os.scandir)


def install(
    scratch: str,
    keep: Sequence[str],
    protect: Sequence[str] = (),
    wants: Callable[[str], bool] | None = None,
) -> Mirror:
    """Redirect the writes of this process. Not reversible; once per process.

    Args:
        scratch: real path of an existing directory, written to for real.
        keep: real paths that are written for real.
        protect, wants: as for `Mirror`.
    """
    mirror = Mirror(scratch, keep, protect, wants)
    replaced: dict[int, Any] = {}
    for name, function in _functions(mirror).items():
        original = getattr(os, name)
        replaced[id(original)] = function
        setattr(os, name, function)
        for group in (
            os.supports_dir_fd,
            os.supports_fd,
            os.supports_follow_symlinks,
            os.supports_effective_ids,
        ):
            if original in group:
                group.add(function)
    replaced[id(_open)] = builtins.open = io.open = _open_for(mirror)  # type: ignore[assignment]
    _elsewhere(replaced)
    # Removing trees through descriptors would list directories without what was written instead.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    # The import system writes through functions of its own.
    sys.dont_write_bytecode = True
    if wants is None:
        _environment(scratch)
    _libraries(mirror)
    return mirror


def _environment(scratch: str) -> None:
    """Point temporary files and caches of compiled code at scratch: C code and children use them too."""
    folder = f"{scratch}/tmp"
    _os.makedirs(folder, exist_ok=True)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    for name, below in (
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCH_EXTENSIONS_DIR", "extensions"),
        ("HF_MODULES_CACHE", "huggingface_modules"),
    ):
        os.environ[name] = f"{scratch}/cache/{below}"
