"""Being asked to stop: signals and a user's notice command set a flag, and the loop looks at it between two updates.

A handler does nothing else: it saves nothing, starts no collective, raises nothing, so that it may come at any time.
A loop that does not get back to the flag within the grace (one step takes longer, a compiler is at work) ends with what
was saved before: a checkpoint that is whole is worth more than a newer one that is not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

#: Signals that ask for a checkpoint and an end: preemption, Slurm's and clusters' warning, Ctrl-C.
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Exit code of a run that was asked to stop and can be resumed.
PREEMPTED = 143
INTERRUPTED = 130

#: Seconds between two calls of the notice command, and kept free at the end of the grace.
NOTICE_EVERY = 5.0
SPARE = 1.0

#: Ctrl-C so many times ends at once.
AT_ONCE = 3


class StopRequest:
    """Whether somebody asked this run to stop. Use as a context: handlers are put back at its end."""

    def __init__(
        self, grace: float, say: Callable[[str], None], notice: str = "", *, process_ends: bool = False
    ) -> None:
        """
        Args:
            grace: seconds between the request and the moment everything must be over.
            notice: a shell command that exits with 0 when the machine is about to be taken away.
            process_ends: nothing comes after the training: a run that was asked to stop ignores who asks again, and
                exits with its own code.
        """
        self._process_ends = process_ends
        self.asked = False
        self.why = ""
        self.code = PREEMPTED
        self.at = 0.0
        self.safe = threading.Event()
        """Set when everything worth keeping is on disk."""
        self._grace = grace
        self._say = say
        self._notice = notice
        self._counts: dict[int, int] = {}
        self._before: dict[int, Any] = {}
        self._over = threading.Event()
        self._wake_read, self._wake_write = -1, -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                self._before[number] = signal.signal(number, self._handle)
            self._wake_read, self._wake_write = os.pipe()
            os.set_blocking(self._wake_write, False)
            threading.Thread(target=self._watch_grace, name="upshift-grace", daemon=True).start()
        if self._notice:
            threading.Thread(target=self._watch_notice, name="upshift-notice", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for number, handler in self._before.items():
            if self.asked and self._process_ends:
                handler = signal.SIG_IGN
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()
        if self._wake_write >= 0:
            os.close(self._wake_write)
            self._wake_write = -1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._counts[number] = self._counts.get(number, 0) + 1
        if number == signal.SIGINT and self._counts[number] >= AT_ONCE:
            raise KeyboardInterrupt
        first = not self.asked
        self._ask(signal.Signals(number).name, INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        before = self._before.get(number)
        if first and callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # the handler that was there before keeps its say

    def _ask(self, why: str, code: int) -> None:
        if self.asked:
            return
        self.why, self.code, self.at = why, code, time.monotonic()
        self.asked = True
        if self._wake_write >= 0:
            try:
                os.write(self._wake_write, b"!")
            except OSError:
                pass

    def ask(self, why: str) -> None:
        """Ask from inside the program (another rank was asked, the notice command spoke)."""
        self._ask(why, PREEMPTED)

    @property
    def left(self) -> float:
        """Seconds of the grace that are left."""
        return self._grace - (time.monotonic() - self.at) if self.asked else self._grace

    def _watch_grace(self) -> None:
        """End the process where the loop did not come back in time; what was saved before is whole."""
        descriptor = self._wake_read
        try:
            woken = os.read(descriptor, 1)
        except OSError:
            return
        finally:
            os.close(descriptor)
        if not woken:
            return
        if self._over.wait(max(self.left - SPARE, 0.1)) or self.safe.is_set():
            return
        if self.code == INTERRUPTED:
            return  # at a terminal nobody takes the machine away; Ctrl-C again ends it
        self._say(f"{self.why}: the step under way did not end within the grace; the last checkpoint stands")
        os._exit(self.code)

    def _watch_notice(self) -> None:
        while not self._over.wait(NOTICE_EVERY):
            try:
                found = subprocess.run(
                    self._notice, shell=True, timeout=NOTICE_EVERY, check=False,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            except (subprocess.TimeoutExpired, OSError):
                continue
            if found.returncode == 0:
                self.ask("the notice command")
                return
