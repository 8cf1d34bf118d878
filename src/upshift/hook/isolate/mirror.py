"""The merged view of the real file system and of what was written instead of to it: where a path's content lies.

What was written, copied for appending, or created lies in `<scratch>/mirror/<absolute path>`; what was removed is
remembered below `<scratch>/gone` and never removed for real. All state is on disk, so that forked processes
(data-loader workers, multiprocessing) see each other's writes.

A *logical* path is what the script means; it is *canonical* when absolute and free of symbolic links in the merged
view; its *actual* path is where its content lies, in the mirror or for real.
"""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
import stat
from collections.abc import Callable, Sequence
from typing import Any

from upshift.hook.isolate import originals
from upshift.hook.isolate.originals import error, is_folder, lstat, remove_tree, system

_REAL = ("/dev/", "/proc/", "/sys/")
_LINKS_MAX = 40
Fd = int | None


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
        self.cwd: str = system.getcwd()
        self._real = (scratch, *keep)
        self._protected = tuple(protect)
        self._wants = wants
        self._folders: dict[str, str] = {}
        for path in (self.root, self.hidden):
            system.makedirs(path, exist_ok=True)

    # -- paths -------------------------------------------------------------------------------------------

    def passes(self, path: str) -> bool:
        """Whether writes to `path` are real."""
        return any(path == real or path.startswith(real + "/") for real in self._real) or self._device(path)

    def _device(self, path: str) -> bool:
        """Whether a path is a device, or one of the links of /proc that lead to no path."""
        if not path.startswith(_REAL) or ".." in path:
            return False
        return not any(path == inside or path.startswith(inside + "/") for inside in self._protected)

    def absolute(self, path: Any, dir_fd: Fd = None) -> str | None:
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
            base = self.cwd if dir_fd is None else system.readlink(f"/proc/self/fd/{dir_fd}")
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
                raise error(errno.ELOOP)
            if target.startswith("/"):
                done = ""
            todo += [part for part in target.split("/") if part not in ("", ".")][::-1]
        return done or "/"

    def _link(self, path: str) -> str | None:
        actual = self.actual(path)
        status = lstat(actual)
        if status is None or not stat.S_ISLNK(status.st_mode):
            return None
        target: str = system.readlink(actual)
        return target

    def actual(self, path: str) -> str:
        """Where the content of a canonical path lies; a path that does not exist if it was removed."""
        mirrored = self.root + path
        # Asking first whether its folder is there spares most reads an exception.
        if system.access(posixpath.dirname(mirrored), os.F_OK) and lstat(mirrored) is not None:
            return mirrored
        return mirrored if self.gone(path) else path

    def gone(self, path: str) -> bool:
        """Whether the real entry at a canonical path, or a directory above it, was removed."""
        here = self.hidden
        for part in path.split("/")[1:]:
            here = f"{here}/{part}"
            if not system.access(here, os.F_OK):
                return False
            if not is_folder(here):
                return True
        return False

    def exists(self, path: str) -> bool:
        """Whether a canonical path exists in the merged view, be it a dangling link."""
        return lstat(self.actual(path)) is not None

    # -- changes -----------------------------------------------------------------------------------------

    def read(self, path: Any, dir_fd: Fd = None, follow: bool = True) -> str | None:
        """The actual path to read from; None for arguments to leave as they are."""
        text = self.absolute(path, dir_fd)
        if text is None or self._device(text):
            return None
        name = self.canonical(text, follow)
        return name if self.passes(name) else self.actual(name)

    def locate(self, path: Any, dir_fd: Fd = None, follow: bool = True) -> tuple[str, bool] | None:
        """The canonical path to write to and whether it is mirrored; None for arguments to leave alone."""
        text = self.absolute(path, dir_fd)
        if text is None or self._device(text):
            return None
        name = self.canonical(text, follow)
        if self.passes(name):
            return name, False
        if self._wants is None or self._wants(name):
            return name, True
        return name, lstat(self.root + name) is not None or self.gone(name)

    def write(self, path: Any, dir_fd: Fd = None, follow: bool = True) -> str | None:
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
        status = lstat(self.actual(folder))
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise error(errno.ENOENT if status is None and not self._through_file(folder) else errno.ENOTDIR)
        self._make(folder)
        return self.root + name

    def _through_file(self, path: str) -> bool:
        """Whether a directory above `path` is something else."""
        while path != "/":
            path = posixpath.dirname(path)
            status = lstat(self.actual(path))
            if status is not None:
                return not stat.S_ISDIR(status.st_mode)
        return False

    def prepare(self, name: str, content: bool = True) -> str:
        """Make a canonical path writable in the mirror: a place and a copy of the real file, with its mode.

        Raises:
            OSError: as for `place`.
        """
        target = self.place(name)
        if lstat(target) is None and not self.gone(name):
            self._copy_up(name, content)
        return target

    def _make(self, folder: str) -> None:
        if folder == "/" or lstat(self.root + folder) is not None:
            return
        self._make(posixpath.dirname(folder))
        status = system.stat(folder)
        system.mkdir(self.root + folder)
        system.chmod(self.root + folder, stat.S_IMODE(status.st_mode) | 0o700)
        system.utime(self.root + folder, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _copy_up(self, name: str, content: bool) -> None:
        status = lstat(name)
        if status is None:
            return
        target = self.root + name
        if stat.S_ISLNK(status.st_mode):
            system.symlink(system.readlink(name), target)
        elif stat.S_ISDIR(status.st_mode):
            self._make(name)
        elif stat.S_ISREG(status.st_mode):
            with originals.open_file(target, "wb") as copy:
                if content:
                    with originals.open_file(name, "rb") as source:
                        shutil.copyfileobj(source, copy, 1 << 20)
            system.chmod(target, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)
            system.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def copy_tree(self, name: str) -> None:
        """Bring all of a canonical path into the mirror, before it is renamed."""
        self.prepare(name)
        if is_folder(self.root + name):
            for inner in self.names(name) or ():
                self.copy_tree(f"{name}/{inner}")

    def hide(self, name: str) -> None:
        """Remember that the real entry at a canonical path is no longer there; nothing if there is none."""
        self._folders.clear()
        if self.gone(name) or lstat(name) is None:
            return
        mark = self.hidden + name
        if is_folder(mark):
            remove_tree(mark)
        system.makedirs(posixpath.dirname(mark), exist_ok=True)
        with originals.open_file(mark, "wb"):
            pass

    def new(self, path: Any, dir_fd: Fd = None) -> str | None:
        """The actual path of an entry to create; None as for `read`.

        Raises:
            OSError: it exists already (EEXIST), or as for `place`.
        """
        found = self.locate(path, dir_fd, follow=False)
        if found is None or not found[1]:
            return found[0] if found else None
        if self.exists(found[0]):
            raise error(errno.EEXIST)
        self._folders.clear()
        return self.place(found[0])

    def names(self, name: str) -> list[str] | None:
        """What a canonical directory holds in the merged view; None if that is just its actual content."""
        mirrored = is_folder(self.root + name)
        if not mirrored and not is_folder(self.hidden + name):
            return None
        found = set(system.listdir(self.root + name)) if mirrored else set()
        if not self.gone(name) and is_folder(name):
            for inner in system.listdir(name):
                mark = lstat(f"{self.hidden}{name}/{inner}")
                if mark is None or stat.S_ISDIR(mark.st_mode):
                    found.add(inner)
        return sorted(found)

    def content(self, name: str) -> list[str]:
        """What a canonical directory holds in the merged view."""
        names = self.names(name)
        listed: list[str] = system.listdir(self.actual(name)) if names is None else names
        return listed
