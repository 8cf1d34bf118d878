"""Rung 1: a copy-on-write view of every writable file system, for this process and its children.

A tree is built at a staging point in a private mount namespace and swapped in with pivot_root(2): overlayfs
over every writable directory tree, the record folder bound through, /dev, /proc and /sys as they are, and all
that cannot be copied on write read-only. The real files are lower layers, which overlayfs never writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from upshift.hook.isolate import kernel
from upshift.hook.isolate.view import View

_SOCKETS = 500


@dataclass(frozen=True)
class Layers:
    """Where overlays can keep what is written (the scratch folder, or memory) and with what mount options."""

    in_memory: bool
    options: str


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
    kernel.mount_overlay(lower, upper, work, at, options)
    try:
        os.unlink(f"{at}/file")
        os.rmdir(f"{at}/folder/inner")
        os.rmdir(f"{at}/folder")
        os.mkdir(f"{at}/folder")  # needs an "opaque" extended attribute
        if os.listdir(at) != ["folder"] or os.listdir(f"{at}/folder"):
            raise OSError(errno.EINVAL, "an overlay shows what was removed from it")
    finally:
        kernel.call("umount2", os.fsencode(at), kernel.MNT_DETACH)


def _staging(scratch: str) -> str:
    """An empty tmpfs to build on, mounted in the scratch folder, or over it if nothing can be made there."""
    stage = f"{scratch}/stage"
    try:
        os.makedirs(stage, mode=0o700, exist_ok=True)
    except OSError:
        stage = scratch
    kernel.mount("tmpfs", stage, "tmpfs", 0, "mode=700")
    return stage


def find_layers(scratch: str) -> Layers:
    """Enter new namespaces and find out how overlays work there. For a process that ends after it.

    Args:
        scratch: existing empty directory; real path. Some empty directories are left in it.

    Raises:
        OSError: namespaces or overlayfs cannot be had.
    """
    kernel.namespaces()
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
    made_user = kernel.namespaces()
    mounts = kernel.reachable()
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
    kernel.mount(root, root, "", kernel.MS_BIND)
    view = View(root, (folder, stage), layers.options, mounts, important)
    view.cover("/", root)
    view.settle()
    endpoints = [path for path in _endpoints() if not kernel.below(path, scratch)]
    through = [(f"{folder}/inside", scratch), *((path, path) for path in keep)]
    for source, path in sorted(through, key=lambda pair: pair[1].count("/")):
        kernel.mount(source, kernel.join(root, path), "", kernel.MS_BIND | kernel.MS_REC)
    for path in endpoints:
        if not any(kernel.below(path, kept) for kept in keep):
            with contextlib.suppress(OSError):  # it may have gone by now
                kernel.mount(path, kernel.join(root, path), "", kernel.MS_BIND)
    kernel.swap_root(root, cwd)
    if made_user and os.geteuid() != 0:
        kernel.drop_capabilities()
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
    """Whether `path`, or else the nearest directory above it, cannot be copied up (see `View.settle`)."""
    overflow = kernel.overflow_ids()
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
