"""Where a process stands: the stack of its main thread, asked for from inside or from outside.

From outside there are two ways, tried in this order by `of_process`: a signal, on which `faulthandler` writes the
stacks to a file (it runs without the interpreter's lock, so also in a process that is stuck in native code), and
py-spy, where it is installed and allowed. A process that was stopped (SIGSTOP) answers no signal.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

#: SIGUSR1 is what clusters warn with.
SIGNAL = signal.SIGUSR2

#: Seconds that a process has to write its stacks, and py-spy to read them.
ANSWER = 2.0
READING = 5.0

_kept: list[object] = []


def answering() -> str:
    """Write stacks to a file on `SIGNAL` from now on; the file, or nothing where the signal is taken."""
    if signal.getsignal(SIGNAL) is not signal.SIG_DFL:
        return ""
    handle, name = tempfile.mkstemp(prefix="upshift-stack-", suffix=".txt")
    file = os.fdopen(handle, "w")
    _kept.append(file)
    faulthandler.register(SIGNAL, file=file, all_threads=True)
    reached = Path(f"/proc/{os.getpid()}/fd/{handle}")
    if not reached.exists():
        return name
    # Without a name of its own nothing is left behind by a process that is killed.
    Path(name).unlink()
    return str(reached)


def no_longer(name: str) -> None:
    """Undo `answering`."""
    if name:
        faulthandler.unregister(SIGNAL)
        if not name.startswith("/proc/"):
            Path(name).unlink(missing_ok=True)


def of_main_thread() -> str:
    """The main thread's stack, innermost call last; called in any thread of the process."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def of_process(pid: int, file: str) -> str:
    """Stacks of another process of this machine, or nothing.

    Args:
        file: what `answering` returned there.
    """
    return (_by_signal(pid, Path(file)) if file else "") or _by_py_spy(pid)


def _by_signal(pid: int, file: Path) -> str:
    try:
        before = size = file.stat().st_size
        os.kill(pid, SIGNAL)
        until = time.monotonic() + ANSWER
        while time.monotonic() < until:
            time.sleep(0.05)
            now = file.stat().st_size
            if now > before and now == size:
                return _without_own(file.read_text(errors="replace")[before:])
            size = now
    except OSError:
        # The process is gone, or belongs to somebody else.
        pass
    return ""


def _without_own(text: str) -> str:
    """Stacks of all threads but those that look after the others."""
    return "\n\n".join(stack for stack in text.split("\n\n") if "engine/watch.py" not in stack)


def _by_py_spy(pid: int) -> str:
    program = shutil.which("py-spy")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True, text=True, timeout=READING, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
