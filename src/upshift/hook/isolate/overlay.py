"""Rung 1: a copy-on-write view of every writable file system, for this process and its children.

A tree is built at a staging point in a private mount namespace and swapped in with pivot_root(2): overlayfs
over every writable directory tree, the record folder bound through, /dev, /proc and /sys as they are, and all
that cannot be copied on write read-only. The real files are lower layers, which overlayfs never writes.

Sources: mount_namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), proc_pid_mountinfo(5) and
Documentation/filesystems/overlayfs.rst of the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 1 << 5, 1 << 12, 1 << 14, 1 << 18
_MS_OF = {
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
}
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SYS_MOUNT_SETATTR = 442  # one number on every architecture

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
_SOCKETS = 500
_SCAN_SECONDS, _SCAN_DEPTH = 0.02, 3

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    result = int(getattr(_libc, name)(*arguments))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    encoded = (os.fsencode(source), os.fsencode(target), kind.encode() or None)
    try:
        _call("mount", *encoded, ctypes.c_ulong(flags), os.fsencode(data) or None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({kind or 'bind'} on {target})") from None


def _below(path: str, folder: str) -> bool:
    """Whether `path` is strictly inside `folder`; both absolute and normal."""
    return path != folder and path.startswith(folder.rstrip("/") + "/")


def _join(root: str, path: str) -> str:
    """Where the absolute `path` lies in the tree rooted at `root`."""
    return root if path == "/" else root + path


@dataclass(frozen=True)
class _MountPoint:
    point: str
    kind: str
    options: frozenset[str]


class _Mounts:
    """The mounts that can be reached by path now; those hidden below another mount are left out."""

    def __init__(self, text: str) -> None:
        rows: dict[int, tuple[int, _MountPoint]] = {}
        children: dict[int, list[int]] = {}
        for line in text.splitlines():
            left, _, right = line.partition(" - ")
            fields = left.split(" ")
            escaped = fields[4].encode("utf-8", "surrogateescape")
            point = os.fsdecode(escaped.decode("unicode_escape").encode("latin-1"))
            # A bind mount of a writable file system can be read-only, and the other way round.
            options = frozenset(fields[5].split(",")) | ({"ro"} & set(right.split(" ")[2].split(",")))
            rows[int(fields[0])] = (int(fields[1]), _MountPoint(point, right.split(" ")[0], options))
            children.setdefault(int(fields[1]), []).append(int(fields[0]))
        self._reachable: dict[str, _MountPoint] = {}
        roots = [number for number, (_, row) in rows.items() if row.point == "/"]
        pending = [number for number in roots if rows[number][0] == number or rows[number][0] not in rows]
        while pending:
            number = pending.pop()
            row = rows[number][1]
            kids = children.get(number, [])
            stacked = [kid for kid in kids if kid != number and rows[kid][1].point == row.point]
            if stacked:
                pending.append(stacked[-1])
                continue
            self._reachable[row.point] = row
            points = [rows[kid][1].point for kid in kids]
            pending += [kid for kid in kids if not any(_below(rows[kid][1].point, other) for other in points)]
        if "/" not in self._reachable:
            raise OSError(errno.EINVAL, "the root directory is not the root of a mount")

    def at(self, path: str) -> _MountPoint | None:
        """The mount whose root is `path`."""
        return self._reachable.get(path)

    def under(self, path: str) -> list[str]:
        """The mount points inside `path` that are not inside another of them, sorted."""
        inside = sorted(point for point in self._reachable if _below(point, path))
        return [point for point in inside if not any(_below(point, other) for other in inside)]

    def holding(self, path: str) -> _MountPoint:
        """The mount that `path` lies on."""
        while path not in self._reachable:
            path = os.path.dirname(path)
        return self._reachable[path]


def _mounts() -> _Mounts:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return _Mounts(file.read())


def _namespaces() -> bool:
    """Enter a new mount namespace; True when a user namespace had to be made for it.

    Raises:
        OSError: the kernel or a security module refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    made = False
    try:
        # With the right to mount, no user namespace: in one, the files of everybody else belong to nobody.
        _call("unshare", _CLONE_NEWNS)
    except OSError:
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
        made = True
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    return made


def _maps_everyone() -> bool:
    """Whether every user and group id exists in this user namespace."""
    for name in ("uid_map", "gid_map"):
        lengths = [int(line.split()[2]) for line in Path("/proc/self", name).read_text().splitlines()]
        if sum(lengths) < 2**32 - 1:
            return False
    return True


def _overflow_ids() -> tuple[int, int]:
    """What the ids that do not exist in this user namespace look like."""
    folder = Path("/proc/sys/kernel")
    return int((folder / "overflowuid").read_text()), int((folder / "overflowgid").read_text())


def _read_only(tree: str) -> None:
    """Make every mount of `tree` read-only, in this namespace only."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    try:
        _call(
            "syscall", ctypes.c_long(_SYS_MOUNT_SETATTR), _AT_FDCWD, os.fsencode(tree), _AT_RECURSIVE,
            ctypes.byref(attributes), ctypes.c_size_t(32),
        )  # fmt: skip
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # Before Linux 5.12: one at a time, keeping the flags a user namespace may not clear.
        mounts = _mounts()
        pending = [tree]
        while pending:
            point = pending.pop()
            flags = sum(value for name, value in _MS_OF.items() if name in mounts.holding(point).options)
            _mount("none", point, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)
            pending += mounts.under(point)


@dataclass(frozen=True)
class Layers:
    """Where overlays can keep what is written (the scratch folder, or memory) and with what mount options."""

    in_memory: bool
    options: str


class _View:
    """Builds the new tree at `root` out of the real one."""

    def __init__(
        self, root: str, layers: tuple[str, str], options: str, mounts: _Mounts, important: Sequence[str]
    ) -> None:
        self.root = root
        self.mounts = mounts
        self.layers = layers  # a folder on disk (or the next again) and one in memory
        self.options = options
        self.important = important
        self.read_only: list[str] = []
        self.overlays: set[str] = set()
        self.everyone = _maps_everyone()
        self.overflow = _overflow_ids()
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
        small = real in _IN_MEMORY and not any(path == real or _below(path, real) for path in self.important)
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
            _mount_overlay(real, upper, work, at, self.options)
        except OSError:
            return False
        self.overlays.add(real)
        return True

    def _bind(self, real: str, at: str, *, writable: bool) -> None:
        _mount(real, at, "", _MS_BIND | _MS_REC)
        if not writable:
            _read_only(at)

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
        _mount(copy, at, "", _MS_BIND)
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
            if not any(path == real or _below(path, real) for real in _REAL):
                elsewhere.append(path)
            elif _below(path, "/dev/shm"):
                # Shared memory stays real, a project kept there does not.
                top = "/".join(path.split("/")[:4])
                at = _join(self.root, top)
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
                self.shared |= any(folder == path or _below(folder, path) for path in self._projects)
            if writable and (foreign or not good) and "ro" not in self.mounts.holding(folder).options:
                return self._overlay(folder, _join(self.root, folder))
        except OSError:
            return False
        return good and not foreign


def _mount_overlay(lower: str, upper: str, work: str, at: str, options: str) -> None:
    """Mount one overlay. The layers are passed as descriptors: commas and colons in paths need no escapes."""
    descriptors: list[int] = []
    try:
        for path in (lower, upper, work):
            descriptors.append(os.open(path, os.O_PATH | os.O_DIRECTORY))
        named = zip(("lowerdir", "upperdir", "workdir"), descriptors, strict=True)
        layers = ",".join(f"{name}=/proc/self/fd/{number}" for name, number in named)
        _mount("overlay", at, "overlay", 0, layers + ("," + options if options else ""))
    finally:
        for number in descriptors:
            os.close(number)


def _try_layers(folder: str, stage: str, attempt: int, options: str) -> None:
    """Mount a small overlay with its upper layer in `folder`, use it, unmount it.

    Raises:
        OSError: the file system cannot hold an upper layer, or not with these options.
    """
    lower, at = f"{stage}/lower{attempt}", f"{stage}/at"
    # A used work directory may not be used again with other options.
    upper, work = f"{folder}/upper/try{attempt}", f"{folder}/work/try{attempt}"
    for path in (f"{lower}/folder/inner", at, upper, work):
        os.makedirs(path, mode=0o700, exist_ok=True)
    with open(f"{lower}/file", "w"):
        pass
    _mount_overlay(lower, upper, work, at, options)
    try:
        os.unlink(f"{at}/file")
        os.rmdir(f"{at}/folder/inner")
        os.rmdir(f"{at}/folder")
        os.mkdir(f"{at}/folder")  # needs an "opaque" extended attribute
        if os.listdir(at) != ["folder"] or os.listdir(f"{at}/folder"):
            raise OSError(errno.EINVAL, "an overlay shows what was removed from it")
    finally:
        _call("umount2", os.fsencode(at), _MNT_DETACH)


def _staging(scratch: str) -> str:
    """An empty tmpfs to build on, mounted in the scratch folder, or over it if nothing can be made there."""
    stage = f"{scratch}/stage"
    try:
        os.makedirs(stage, mode=0o700, exist_ok=True)
    except OSError:
        stage = scratch
    _mount("tmpfs", stage, "tmpfs", 0, "mode=700")
    return stage


def find_layers(scratch: str) -> Layers:
    """Enter new namespaces and find out how overlays work there. For a process that ends after it.

    Args:
        scratch: existing empty directory; real path. Some empty directories are left in it.

    Raises:
        OSError: namespaces or overlayfs cannot be had.
    """
    _namespaces()
    stage = _staging(scratch)
    # volatile: data that will be thrown away need not be flushed when the trial ends.
    variants = ["userxattr,volatile", "userxattr"]
    if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
        variants = ["redirect_dir=on,volatile", "redirect_dir=on", "", *variants]
    last = OSError(errno.ENOSYS, "overlayfs is missing")
    attempt = 0
    for folder in dict.fromkeys((scratch, stage)):
        for options in variants:
            attempt += 1
            try:
                _try_layers(folder, stage, attempt, options)
                return Layers(folder == stage, options)
            except OSError as error:
                last = error
    raise last


def _swap_root(root: str, cwd: str) -> None:
    """Make `root` the root directory, as pivot_root(2) describes with one directory for both arguments."""
    os.chdir(root)
    try:
        _call("pivot_root", b".", b".")
        _call("umount2", b".", _MNT_DETACH)
    except (AttributeError, OSError):
        # An initramfs cannot be pivoted away from.
        os.chroot(root)
    os.chdir("/")
    os.chdir(cwd)


def _drop_capabilities() -> None:
    """Give back the rights the user namespace brought: files stay as (un)writable as they really are."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(header), ctypes.byref(data))


@dataclass(frozen=True)
class Entered:
    """What `enter` could not make copy-on-write.

    `read_only`: places that are read-only now. `shared`: there are writable directories of other owners,
    whose existing files cannot be copied up.
    """

    read_only: tuple[str, ...]
    shared: bool


def enter(scratch: str, layers: Layers, keep: Sequence[str], important: Sequence[str]) -> Entered:
    """Swap this process's view of the file system for a copy-on-write one. Not reversible.

    Args:
        scratch: existing directory; real path. Inside the view it is empty and writable.
        layers: what `find_layers` found for this scratch folder.
        keep: real paths that stay writable for real.
        important: real paths of directories the script is likely to write below.

    Raises:
        OSError: some step is not allowed or not supported; the process may already be in new namespaces.
    """
    cwd = os.getcwd()
    made_user = _namespaces()
    mounts = _mounts()
    stage = _staging(scratch)
    folder = stage if layers.in_memory else scratch
    root = f"{stage}/root"
    for path in (
        root,
        f"{folder}/inside",
        *(f"{at}/{kind}" for at in (folder, stage) for kind in ("upper", "work")),
    ):
        os.makedirs(path, mode=0o700, exist_ok=True)
    # pivot_root wants a mount point even if the view's own root turns out to be a copied directory.
    _mount(root, root, "", _MS_BIND)
    view = _View(root, (folder, stage), layers.options, mounts, important)
    view.cover("/", root)
    view.settle()
    endpoints = [path for path in _endpoints() if not _below(path, scratch)]
    through = [(f"{folder}/inside", scratch), *((path, path) for path in keep)]
    for source, path in sorted(through, key=lambda pair: pair[1].count("/")):
        _mount(source, _join(root, path), "", _MS_BIND | _MS_REC)
    for path in endpoints:
        if not any(_below(path, kept) for kept in keep):
            with contextlib.suppress(OSError):  # it may have gone by now
                _mount(path, _join(root, path), "", _MS_BIND)
    _swap_root(root, cwd)
    if made_user and os.geteuid() != 0:
        _drop_capabilities()
    return Entered(tuple(view.read_only), view.shared)


def _endpoints() -> Iterator[str]:
    """Paths through which running services are reached; behind an overlay they would lead nowhere.

    These are the Unix sockets bound now (agents, databases, displays) and the pipes of CUDA's multi-process
    service.
    """
    pipes = os.path.realpath(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if os.path.isdir(pipes):
        yield pipes
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        paths = {line.split(" /", 1)[1].rstrip("\n") for line in file if " /" in line}
    for path in sorted(paths)[:_SOCKETS]:
        if not path.startswith(pipes + "/") and _is_socket("/" + path):
            yield "/" + path


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode) and os.path.realpath(path) == path
    except OSError:
        return False


def foreign_owner(path: str) -> bool:
    """Whether `path`, or else the nearest directory above it, cannot be copied up (see `_View.settle`)."""
    overflow = _overflow_ids()
    while True:
        try:
            status = os.stat(path)
        except OSError:
            if path in ("/", ""):
                return False
            path = os.path.dirname(path)
            continue
        return status.st_uid == overflow[0] or status.st_gid == overflow[1]


def remove(path: str) -> None:
    """Delete a directory tree whose directories may have no permission bits, as overlayfs leaves them.

    Raises:
        OSError: something in it cannot be deleted, for instance a directory of another user.
    """
    for folder, folders, _ in os.walk(path):
        for name in folders:
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):
                try:
                    os.chmod(inner, 0o700)
                except OSError:
                    pass
    shutil.rmtree(path)
