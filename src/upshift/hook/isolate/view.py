"""The new tree of a copy-on-write view: overlays where they can be had, the rest bound, copied or read-only."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from upshift.hook.isolate import kernel

_REAL = ("/dev", "/proc", "/sys")
_REAL_TYPES = frozenset(
    [
        "proc",
        "sysfs",
        "devtmpfs",
        "devpts",
        "cgroup",
        "cgroup2",
        "mqueue",
        "debugfs",
        "tracefs",
        "securityfs",
        "bpf",
        "pstore",
        "efivarfs",
        "configfs",
        "fusectl",
        "hugetlbfs",
        "binfmt_misc",
        "rpc_pipefs",
        "nsfs",
        "selinuxfs",
        "nfsd",
    ]
)
# Trees a training script does not write: where they cannot be overlaid whole, read-only is enough.
_SYSTEM = ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/boot")
# Trees little is written to: layers in memory need no cleaning up.
_IN_MEMORY = (*_SYSTEM, "/run", "/media", "/snap")
_OVERLAYS = 300
_COPY_ENTRIES, _COPY_BYTES = 2000, 256 << 20
_SCAN_SECONDS, _SCAN_DEPTH = 0.02, 3


class View:
    """Builds the new tree at `root` out of the real one."""

    def __init__(
        self, root: str, layers: tuple[str, str], options: str, mounts: kernel.Mounts, important: Sequence[str]
    ) -> None:
        self.root = root
        self.mounts = mounts
        self.layers = layers  # a folder on disk (or the next again) and one in memory
        self.options = options
        self.important = important
        self.read_only: list[str] = []
        self.overlays: set[str] = set()
        self.everyone = kernel.maps_everyone()
        self.overflow = kernel.overflow_ids()
        self.shared = False  # project directories of other users or groups that this user may write
        self._projects: list[str] = []
        self._number = 0

    # -- pieces ------------------------------------------------------------------------------------------

    def foreign(self, status: os.stat_result) -> bool:
        """Whether the owner or group does not exist here, so that overlayfs refuses to copy the file up."""
        return not self.everyone and (status.st_uid == self.overflow[0] or status.st_gid == self.overflow[1])

    def _layer(self, real: str) -> tuple[str, str]:
        """A new upper and work directory; the upper one looks like `real`, which it will stand for."""
        self._number += 1
        small = real in _IN_MEMORY and not any(path == real or kernel.below(path, real) for path in self.important)
        upper, work = (f"{self.layers[small]}/{kind}/{self._number}" for kind in ("upper", "work"))
        os.mkdir(upper)
        os.mkdir(work)
        self._resemble(upper, real)
        return upper, work

    def _resemble(self, folder: str, real: str) -> None:
        status = os.stat(real)
        mode = stat.S_IMODE(status.st_mode)
        if self.foreign(status):
            # It becomes ours, with what we may do in the real one.
            allowed = sum(bit for bit in (os.R_OK, os.W_OK, os.X_OK) if os.access(real, bit))
            mode = (mode & 0o7077) | (allowed << 6)
        elif (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(folder, status.st_uid, status.st_gid)
        os.chmod(folder, mode)
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _overlay(self, real: str, at: str) -> bool:
        """Mount a copy-on-write `real` at `at`; False where its file system or a mount inside forbids it."""
        try:
            upper, work = self._layer(real)
        except PermissionError:
            return False
        try:
            kernel.mount_overlay(real, upper, work, at, self.options)
        except OSError:
            return False
        self.overlays.add(real)
        return True

    def _bind(self, real: str, at: str, *, writable: bool) -> None:
        kernel.mount(real, at, "", kernel.MS_BIND | kernel.MS_REC)
        if not writable:
            kernel.read_only(at)

    # -- the tree ----------------------------------------------------------------------------------------

    def cover(self, real: str, at: str) -> None:
        """Put a protected view of `real`, and of all that is mounted inside it, at `at`."""
        mount = self.mounts.holding(real)
        if real in _REAL or mount.kind in _REAL_TYPES:
            self._bind(real, at, writable=True)
            return
        inside = self.mounts.under(real)
        if "ro" in mount.options or mount.kind == "autofs" or not os.path.isdir(real):
            self._bind(real, at, writable=False)
            self._cover_all(inside, real, at)
        elif len(self.overlays) < _OVERLAYS and os.access(real, os.X_OK) and self._overlay(real, at):
            self._cover_all(inside, real, at)
        elif inside and real not in _SYSTEM and os.access(real, os.R_OK | os.W_OK) and self._fits(real):
            self._rebuild(real, at)
        else:
            self._bind(real, at, writable=False)
            if not inside:
                if os.access(real, os.X_OK):
                    self.read_only.append(real)
                return
            if real in _SYSTEM:
                self.read_only.append(real)
            else:
                self._cover_all(self._folders(real, inside), real, at)
                if os.access(real, os.W_OK):
                    self.read_only.append(f"the files directly in {real}")
            self._cover_all(inside, real, at)

    def _cover_all(self, points: Iterable[str], real: str, at: str) -> None:
        for point in points:
            try:
                self.cover(point, at + point[len(real.rstrip("/")) :])
            except OSError:
                # Without its own view it shows what its parent shows: a read-only bind, an empty directory.
                self.read_only.append(point)

    @staticmethod
    def _folders(real: str, inside: list[str]) -> list[str]:
        """The real directories in `real` that nothing is mounted on."""
        found: list[str] = []
        try:
            with os.scandir(real) as entries:
                found = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            pass
        return sorted(path for path in found if path not in inside)

    @staticmethod
    def _fits(real: str) -> bool:
        """Whether what lies directly in `real` is little enough to be copied."""
        count = size = 0
        with os.scandir(real) as entries:
            for entry in entries:
                count += 1
                if entry.is_file(follow_symlinks=False):
                    size += entry.stat(follow_symlinks=False).st_size
        return count <= _COPY_ENTRIES and size <= _COPY_BYTES

    def _rebuild(self, real: str, at: str) -> None:
        """A copy of a directory whose inner mounts keep overlayfs off it; its subdirectories get overlays.

        In a user namespace a directory with mounts inside cannot be a layer: what the mounts hide would show.
        """
        self._number += 1
        copy = f"{self.layers[0]}/upper/{self._number}"
        os.mkdir(copy)
        kernel.mount(copy, at, "", kernel.MS_BIND)
        folders: list[str] = []
        with os.scandir(real) as entries:
            for entry in entries:
                here = f"{at}/{entry.name}"
                try:
                    if entry.is_symlink():
                        os.symlink(os.readlink(entry.path), here)
                    elif entry.is_dir():
                        os.mkdir(here)
                        folders.append(entry.path)
                    elif entry.is_file() and self.mounts.at(entry.path) is None:
                        shutil.copy2(entry.path, here)
                    else:
                        os.close(os.open(here, os.O_CREAT | os.O_WRONLY))
                        self._bind(entry.path, here, writable=not entry.is_file())
                except OSError:
                    self.read_only.append(entry.path)
        self._resemble(copy, real)
        self._cover_all(sorted(folders), real, at)

    # -- directories of other owners ---------------------------------------------------------------------

    def settle(self) -> None:
        """Give directories that need one an overlay of their own.

        In a user namespace, writing below an overlay's root copies the parent directories up, which fails
        with EOVERFLOW where their owner or group does not exist in it: in a setgid project folder, in
        /var/tmp, in /data/<user>.
        """
        elsewhere: list[str] = []
        for path in self.important:
            if not any(path == real or kernel.below(path, real) for real in _REAL):
                elsewhere.append(path)
            elif kernel.below(path, "/dev/shm"):
                # Shared memory stays real, a project kept there does not.
                top = "/".join(path.split("/")[:4])
                at = kernel.join(self.root, top)
                if top not in self.overlays and not self._overlay(top, at):
                    self._bind(top, at, writable=False)
                    self.read_only.append(top)
        self._projects = [path for path in elsewhere if path not in ("/tmp", "/var/tmp")]
        for path in elsewhere:
            good = False
            for folder in (*(str(parent) for parent in reversed(Path(path).parents)), path):
                good = self._settle_one(folder, good)
        if self.everyone:
            return
        deadline = time.monotonic() + _SCAN_SECONDS
        pending = [(path, True, 0) for path in [*elsewhere, *sorted(self.overlays)]]
        while pending and len(self.overlays) < _OVERLAYS and time.monotonic() < deadline:
            folder, good, depth = pending.pop(0)
            if depth == _SCAN_DEPTH or folder in _SYSTEM:
                continue
            for child in self._folders(folder, []):
                if self.mounts.at(child) is None:
                    pending.append((child, self._settle_one(child, good), depth + 1))

    def _settle_one(self, folder: str, good: bool) -> bool:
        """Whether directories in `folder` can be copied up, after giving it an overlay if it needs one."""
        if folder in self.overlays:
            return True
        if folder == "/":
            return False
        try:
            foreign = self.foreign(os.stat(folder))
            writable = os.access(folder, os.W_OK | os.X_OK)
            if foreign and writable:
                self.shared |= any(folder == path or kernel.below(folder, path) for path in self._projects)
            if writable and (foreign or not good) and "ro" not in self.mounts.holding(folder).options:
                return self._overlay(folder, kernel.join(self.root, folder))
        except OSError:
            return False
        return good and not foreign
