"""Keep a trial's writes away from the user's files: the strongest of three means that works here.

    overlay   a copy-on-write view of the file system, for everything a trial starts (Linux, overlayfs)
    landlock  the kernel refuses writes elsewhere (Linux, Landlock); Python's own writes are redirected
    redirect  Python's own writes are redirected

A trial's process calls `enter` once, before torch and the script are imported. Its children inherit the
isolation, so of a group of processes that must see each other's files only the common parent enters.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upshift.errors import NotIsolatedError
from upshift.hook.isolate import landlock, overlay, redirect

__all__ = ["RUNGS", "Isolation", "IsolationError", "enter", "probe", "remove_scratch"]

Rung = Literal["overlay", "landlock", "redirect"]
RUNGS: tuple[Rung, ...] = ("overlay", "landlock", "redirect")
"""From the strongest to the weakest."""

_PROBE_SECONDS = 20.0


class IsolationError(NotIsolatedError):
    """A trial cannot be isolated: the scratch folder is unusable or the rung asked for does not work here."""


@dataclass(frozen=True)
class Isolation:
    """What protects the user's files in this process.

    Attributes:
        rung: the means in use.
        detail: what is protected and what is not, in a sentence for the report.
    """

    rung: Rung
    detail: str


def enter(scratch: Path, keep: Sequence[Path] = (), rung: str | None = None) -> Isolation:
    """Isolate this process and what it starts. Once per process, single-threaded, not reversible.

    Args:
        scratch: existing empty directory that takes what is written, on a disk with room for it.
            In the isolated process it is writable; its content there need not be what others see.
        keep: existing directories or files that stay writable for real. Others see what is written there at
            once; elsewhere, what others change after this call may or may not be seen.
        rung: use this one of `RUNGS` and no other.

    Raises:
        IsolationError: `scratch` or `keep` is unusable, the rung is unknown, or it does not work here.
    """
    if rung is not None and rung not in RUNGS:
        raise IsolationError(f"no isolation rung named {rung!r}", remedy=f"One of {', '.join(RUNGS)}.")
    folder, kept = _checked(scratch, keep)
    refusals: list[str] = []
    for name in RUNGS if rung is None else (rung,):
        try:
            return _ENTER[name](folder, kept)
        except OSError as error:
            refusals.append(f"{name}: {error.strerror or error}")
    raise IsolationError(
        f"trials cannot be isolated here ({'; '.join(refusals)})",
        remedy="Use another scratch folder, or let upshift choose the rung.",
    )


def _checked(scratch: Path, keep: Sequence[Path]) -> tuple[str, list[str]]:
    folder = os.path.realpath(scratch)
    try:
        empty = not os.listdir(folder)
    except OSError as error:
        text = f"scratch folder {scratch}: {error.strerror}"
        raise IsolationError(text, remedy="Create it first.") from error
    if not empty:
        raise IsolationError(f"scratch folder {scratch} is not empty", remedy="Use one directory per trial.")
    kept = [os.path.realpath(path) for path in keep]
    for path in kept:
        if not os.path.exists(path):
            raise IsolationError(f"{path} is to stay writable but does not exist", remedy="Create it first.")
        if path == folder or path.startswith(folder + "/"):
            raise IsolationError(f"{path} lies in the scratch folder", remedy="Keep records elsewhere.")
    return folder, kept


def _likely() -> list[str]:
    """Real paths of the directories a script is likely to write below, the script's own among them."""
    # Not tempfile.gettempdir(), which finds out by writing.
    candidates = [os.getcwd(), os.path.expanduser("~"), os.environ.get("TMPDIR", "/tmp"), "/tmp", "/var/tmp"]
    candidates += [os.path.dirname(os.path.abspath(word)) for word in sys.argv if os.path.isfile(word)]
    real = dict.fromkeys(map(os.path.realpath, candidates))
    return [path for path in real if os.path.isdir(path) and path != "/"]


def _in_shared_memory(paths: Iterable[str]) -> list[str]:
    """The directories directly in /dev/shm that hold some of `paths`: kept projects, not shared memory."""
    return sorted({"/".join(path.split("/")[:4]) for path in paths if path.startswith("/dev/shm/")})


def _in_child(attempt: Callable[[], overlay.Layers]) -> overlay.Layers:
    """The result of something irreversible, from a forked child.

    Raises:
        OSError: what the child got.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        answer: list[Any]
        try:
            layers = attempt()
            answer = [0, layers.in_memory, layers.options]
        except BaseException as error:
            answer = [
                getattr(error, "errno", None) or errno.EPERM,
                str(getattr(error, "strerror", None) or error),
            ]
        try:
            os.write(send, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    code, *values = json.loads(text or '[1, "the attempt ended without an answer"]')
    if code:
        raise OSError(code, values[0])
    return overlay.Layers(*values)


def _overlay(scratch: str, keep: list[str]) -> Isolation:
    _alone()
    try:
        layers = _in_child(lambda: overlay.find_layers(scratch))
        entered = overlay.enter(scratch, layers, keep, _likely())
    except OSError:
        _empty(scratch)
        raise
    text = (
        "Everything the script and its child processes write goes to a copy-on-write view (overlayfs); "
        "/dev, /proc and /sys are the real ones"
    )
    if layers.in_memory:
        text += "; what is written is held in memory"
    if entered.read_only:
        text += "; read-only in trials: " + _some(entered.read_only)
    if entered.shared:
        redirect.install(scratch, keep, wants=overlay.foreign_owner)
        text += "; existing files of other users or groups can be changed by Python code only"
    if "redirect_dir=on" not in layers.options:
        _rename_folders()
    return Isolation("overlay", text + ".")


def _landlock(scratch: str, keep: list[str]) -> Isolation:
    _alone()
    version = landlock.restrict([scratch, *keep, *(path for path in _DEVICES if os.path.exists(path))])
    shared = _in_shared_memory(_likely())
    redirect.install(scratch, keep, shared)
    text = (
        "The kernel refuses writes of the script and its child processes outside the scratch folder "
        "(Landlock); writes of Python code are redirected there, those of C code and child processes fail"
    )
    if version < 3:
        text += "; C code can still truncate files"
    if shared:
        text += f"; in {_some(shared)} only Python code is kept from writing"
    text += "; C code and child processes can still change modes and times of files."
    return Isolation("landlock", text)


def _redirect(scratch: str, keep: list[str]) -> Isolation:
    try:
        redirect.install(scratch, keep, _in_shared_memory(_likely()))
    except OSError:
        _empty(scratch)
        raise
    return Isolation(
        "redirect",
        "Files written, changed or removed by Python code are redirected to the scratch folder; "
        "what C code and child processes write is not.",
    )


_DEVICES = ("/dev", "/dev/shm", "/proc/self")
_ENTER: dict[Rung, Callable[[str, list[str]], Isolation]] = {
    "overlay": _overlay,
    "landlock": _landlock,
    "redirect": _redirect,
}


def _some(names: Iterable[str], most: int = 5) -> str:
    shown = list(dict.fromkeys(names))
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


def _alone() -> None:
    """Refuse in a process with several threads: the kernel isolates the calling one only.

    Raises:
        OSError: there are others (EBUSY).
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError(errno.EBUSY, "other threads are running already")


def _empty(folder: str) -> None:
    """Tidy up after a failed attempt, for the next one."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            overlay.remove(os.path.join(folder, name))


def _rename_folders() -> None:
    """Let `os.rename` move directories that existed before the trial, as they could be moved without it.

    An overlay in a user namespace answers EXDEV for them: it may not record that a directory was renamed.
    """

    def fallback(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def rename(src: Any, dst: Any, **options: Any) -> None:
            try:
                original(src, dst, **options)
            except OSError as error:
                if error.errno != errno.EXDEV or options or os.path.islink(src) or not os.path.isdir(src):
                    raise
                # Two file systems would have answered so without us.
                if os.stat(src).st_dev != os.stat(os.path.dirname(os.path.abspath(dst))).st_dev:
                    raise
                if os.path.isdir(dst):
                    os.rmdir(dst)
                shutil.copytree(src, dst, symlinks=True)
                shutil.rmtree(src)

        rename.__module__ = "os"
        return rename

    os.rename, os.replace = fallback(os.rename), fallback(os.replace)


@functools.cache
def probe() -> str:
    """The rung `enter` would choose for scratch in the temporary directory, tried in a short child process.

    Raises:
        IsolationError: not even the weakest works, or the child did not end in time.
    """
    source = str(Path(__file__).resolve().parents[3])
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from upshift.hook.isolate import enter; "
        "print(enter(pathlib.Path(sys.argv[2])).rung)"
    )
    scratch = Path(tempfile.mkdtemp(prefix="upshift-probe-"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, source, str(scratch)],
            capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        text = "the isolation probe did not end"
        raise IsolationError(text, remedy="Is a network folder hanging?") from error
    finally:
        remove_scratch(scratch)
    rung = done.stdout.strip()
    if done.returncode != 0 or rung not in RUNGS:
        raise IsolationError(
            f"the isolation probe failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}",
            remedy="Use another temporary directory (TMPDIR).",
        )
    return rung


def remove_scratch(path: Path) -> None:
    """Delete a scratch folder after its trial has ended, whatever the rung left in it; nothing if it is gone.

    Raises:
        OSError: something in it cannot be deleted.
    """
    if os.path.lexists(path):
        overlay.remove(str(path))
