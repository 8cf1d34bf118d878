"""A rank whose launcher died ends itself: nobody would stop it, and it would hold its device for ever.

torchrun that is killed cannot stop its ranks. So a rank that torchrun started asks the kernel for SIGTERM when its
parent dies (Linux), and looks itself twice a second whether it has another parent. SIGTERM lets the loop save; after
`GRACE` seconds the process ends whatever it is doing. Ranks that somebody started by hand (`RANK=0 python ... &`) are
left alone: such a shell may well be meant to go.

Source: prctl(2), PR_SET_PDEATHSIG. The kernel sends it when the *thread* that started the process ends; torchrun starts
its ranks from the thread that then waits for them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from upshift.engine.group import LOST

#: Set by torchrun (and whatever is built on its agent) in the processes that it starts.
MARK = "TORCHELASTIC_RUN_ID"

EVERY = 0.5
GRACE = 3.5

_PR_SET_PDEATHSIG = 1


def guard(say: Callable[[str], None], parent: int | None = None) -> bool:
    """Begin to look after this process; whether there is a launcher to look for.

    Args:
        say: is told that the launcher is gone.
        parent: process id of the launcher; default: the parent, where torchrun started this process.
    """
    if parent is None:
        if MARK not in os.environ:
            return False
        parent = os.getppid()
    asked = _ask_kernel()
    threading.Thread(target=_look, args=(parent, asked, say), name="upshift-launcher", daemon=True).start()
    return True


def _ask_kernel() -> bool:
    """Whether the kernel will send SIGTERM when the parent dies."""
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _look(parent: int, asked: bool, say: Callable[[str], None]) -> None:
    # Also finds a parent that died before the kernel was asked.
    while os.getppid() == parent:
        time.sleep(EVERY)
    say(f"the launcher (process {parent}) is gone; this process ends within {GRACE:g} s")
    if not asked:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(LOST)
