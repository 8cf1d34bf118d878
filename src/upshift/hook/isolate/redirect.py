"""Rung 3: writes through Python go to a mirror of the file system below the scratch folder.

The functions of `os`, `open` and the few libraries that write from C++ or Rust get paths of the merged view (`mirror`).
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from typing import Any

from upshift.hook.isolate import originals
from upshift.hook.isolate.libraries import map_libraries
from upshift.hook.isolate.merged import Files
from upshift.hook.isolate.mirror import Fd, Mirror
from upshift.hook.isolate.originals import system


def _named(original: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the name of `original`, and errors that name the path the script gave."""

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except OSError as error:
            if arguments and error.filename is not None:
                error.filename = arguments[0]
                if len(arguments) > 1 and original in (system.rename, system.replace, system.link, system.symlink):
                    error.filename2 = arguments[1]
            raise

    call.__module__ = "os"  # where pickle shall look for it
    return call


def _functions(mirror: Files) -> dict[str, Callable[..., Any]]:
    """Replacements for functions of `os`, by name."""

    def mapped(name: str, where: Callable[..., str | None], **fixed: bool) -> Callable[..., Any]:
        original = getattr(system, name)

        def function(path: Any, *arguments: Any, dir_fd: Fd = None, **options: Any) -> Any:
            follow = fixed if "follow_symlinks" not in options else {"follow": options["follow_symlinks"]}
            target = where(path, dir_fd, **follow)
            if target is None:
                return original(path, *arguments, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))
            return original(target, *arguments, **options)

        return function

    def unlink(path: Any, *, dir_fd: Fd = None) -> None:
        mirror.unlink(path, dir_fd=dir_fd)

    def rmdir(path: Any, *, dir_fd: Fd = None) -> None:
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
    return {name: _named(getattr(system, name), function) for name, function in found.items()}


def _open_for(mirror: Mirror) -> Callable[..., Any]:
    """A replacement for `open`, mapping through an opener: the file's name stays the one asked for."""

    def through(path: Any, flags: int) -> int:
        return os.open(path, flags, 0o666)

    @functools.wraps(originals.open_file)
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
        return originals.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)

    replacement.__module__ = "io"
    return replacement


def _elsewhere(replaced: dict[int, Any]) -> None:
    """Replace the functions in the modules that took them by name before us (`from os import rename`)."""
    skip = {
        "os",
        "posix",
        "_io",
        "io",
        "builtins",
        originals.__name__,
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
    mirror = Files(scratch, keep, protect, wants)
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
    replaced[id(originals.open_file)] = builtins.open = io.open = _open_for(mirror)  # type: ignore[assignment]
    _elsewhere(replaced)
    # Removing trees through descriptors would list directories without what was written instead.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    # The import system writes through functions of its own.
    sys.dont_write_bytecode = True
    if wants is None:
        _environment(scratch)
    map_libraries(mirror)
    return mirror


def _environment(scratch: str) -> None:
    """Point temporary files and caches of compiled code at scratch: C code and children use them too."""
    folder = f"{scratch}/tmp"
    system.makedirs(folder, exist_ok=True)
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
