"""Mount namespaces and overlayfs: the calls to the kernel, and the table of mounts.

Sources: mount_namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), proc_pid_mountinfo(5) and
Documentation/filesystems/overlayfs.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_RDONLY, _MS_REMOUNT, MS_BIND, MS_REC, _MS_PRIVATE = 1, 1 << 5, 1 << 12, 1 << 14, 1 << 18
_MS_OF = {
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
}
MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SYS_MOUNT_SETATTR = 442  # one number on every architecture

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    result = int(getattr(_libc, name)(*arguments))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    encoded = (os.fsencode(source), os.fsencode(target), kind.encode() or None)
    try:
        call("mount", *encoded, ctypes.c_ulong(flags), os.fsencode(data) or None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({kind or 'bind'} on {target})") from None


def below(path: str, folder: str) -> bool:
    """Whether `path` is strictly inside `folder`; both absolute and normal."""
    return path != folder and path.startswith(folder.rstrip("/") + "/")


def join(root: str, path: str) -> str:
    """Where the absolute `path` lies in the tree rooted at `root`."""
    return root if path == "/" else root + path


@dataclass(frozen=True)
class MountPoint:
    point: str
    kind: str
    options: frozenset[str]


class Mounts:
    """The mounts that can be reached by path now; those hidden below another mount are left out."""

    def __init__(self, text: str) -> None:
        rows: dict[int, tuple[int, MountPoint]] = {}
        children: dict[int, list[int]] = {}
        for line in text.splitlines():
            left, _, right = line.partition(" - ")
            fields = left.split(" ")
            escaped = fields[4].encode("utf-8", "surrogateescape")
            point = os.fsdecode(escaped.decode("unicode_escape").encode("latin-1"))
            # A bind mount of a writable file system can be read-only, and the other way round.
            options = frozenset(fields[5].split(",")) | ({"ro"} & set(right.split(" ")[2].split(",")))
            rows[int(fields[0])] = (int(fields[1]), MountPoint(point, right.split(" ")[0], options))
            children.setdefault(int(fields[1]), []).append(int(fields[0]))
        self._reachable: dict[str, MountPoint] = {}
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
            pending += [kid for kid in kids if not any(below(rows[kid][1].point, other) for other in points)]
        if "/" not in self._reachable:
            raise OSError(errno.EINVAL, "the root directory is not the root of a mount")

    def at(self, path: str) -> MountPoint | None:
        """The mount whose root is `path`."""
        return self._reachable.get(path)

    def under(self, path: str) -> list[str]:
        """The mount points inside `path` that are not inside another of them, sorted."""
        inside = sorted(point for point in self._reachable if below(point, path))
        return [point for point in inside if not any(below(point, other) for other in inside)]

    def holding(self, path: str) -> MountPoint:
        """The mount that `path` lies on."""
        while path not in self._reachable:
            path = os.path.dirname(path)
        return self._reachable[path]


def reachable() -> Mounts:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return Mounts(file.read())


def namespaces() -> bool:
    """Enter a new mount namespace; True when a user namespace had to be made for it.

    Raises:
        OSError: the kernel or a security module refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    made = False
    try:
        # With the right to mount, no user namespace: in one, the files of everybody else belong to nobody.
        call("unshare", _CLONE_NEWNS)
    except OSError:
        call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
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
    mount("none", "/", "", MS_REC | _MS_PRIVATE)
    return made


def maps_everyone() -> bool:
    """Whether every user and group id exists in this user namespace."""
    for name in ("uid_map", "gid_map"):
        lengths = [int(line.split()[2]) for line in Path("/proc/self", name).read_text().splitlines()]
        if sum(lengths) < 2**32 - 1:
            return False
    return True


def overflow_ids() -> tuple[int, int]:
    """What the ids that do not exist in this user namespace look like."""
    folder = Path("/proc/sys/kernel")
    return int((folder / "overflowuid").read_text()), int((folder / "overflowgid").read_text())


def read_only(tree: str) -> None:
    """Make every mount of `tree` read-only, in this namespace only."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    try:
        call(
            "syscall", ctypes.c_long(_SYS_MOUNT_SETATTR), _AT_FDCWD, os.fsencode(tree), _AT_RECURSIVE,
            ctypes.byref(attributes), ctypes.c_size_t(32),
        )  # fmt: skip
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # Before Linux 5.12: one at a time, keeping the flags a user namespace may not clear.
        mounts = reachable()
        pending = [tree]
        while pending:
            point = pending.pop()
            flags = sum(value for name, value in _MS_OF.items() if name in mounts.holding(point).options)
            mount("none", point, "", _MS_REMOUNT | MS_BIND | _MS_RDONLY | flags)
            pending += mounts.under(point)


def mount_overlay(lower: str, upper: str, work: str, at: str, options: str) -> None:
    """Mount one overlay. The layers are passed as descriptors: commas and colons in paths need no escapes."""
    descriptors: list[int] = []
    try:
        for path in (lower, upper, work):
            descriptors.append(os.open(path, os.O_PATH | os.O_DIRECTORY))
        named = zip(("lowerdir", "upperdir", "workdir"), descriptors, strict=True)
        layers = ",".join(f"{name}=/proc/self/fd/{number}" for name, number in named)
        mount("overlay", at, "overlay", 0, layers + ("," + options if options else ""))
    finally:
        for number in descriptors:
            os.close(number)


def swap_root(root: str, cwd: str) -> None:
    """Make `root` the root directory, as pivot_root(2) describes with one directory for both arguments."""
    os.chdir(root)
    try:
        call("pivot_root", b".", b".")
        call("umount2", b".", MNT_DETACH)
    except (AttributeError, OSError):
        # An initramfs cannot be pivoted away from.
        os.chroot(root)
    os.chdir("/")
    os.chdir(cwd)


def drop_capabilities() -> None:
    """Give back the rights the user namespace brought: files stay as (un)writable as they really are."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    call("capset", ctypes.byref(header), ctypes.byref(data))
