"""Being asked to stop: signals and a user's notice command set a flag, and the loop looks at it between two updates.

A handler does nothing else: it saves nothing, starts no collective, raises nothing, so that it may come at any time.
Python runs it in the main thread, between two of its own instructions; where that thread is in a long call of C (a
compiler, a large product of matrices) it comes late. So the interpreter is asked to write the number of every signal to
a pipe (`signal.set_wakeup_fd`), which a thread reads: the request is known at once, whatever the main thread does.

That thread also sees to it that the end comes within the grace. When the loop has not come back to the flag after a
third of it, what belongs to the last update is saved from there (`boundary`), and the process ends in the middle of its
update. Where that cannot be done it ends a second before the grace is over, with what was saved before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from upshift.engine import children
from upshift.engine.peers import within

#: Signals that ask for a checkpoint and an end: preemption, Slurm's and clusters' warning, Ctrl-C.
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Exit code of a run that was asked to stop and can be resumed.
PREEMPTED = 143
INTERRUPTED = 130

#: Seconds between two calls of the notice command, and kept free at the end of the grace.
NOTICE_EVERY = 5.0
SPARE = 1.0

#: Share of the grace that an update is given to end by itself, and seconds between two tries to do without.
PATIENCE, AGAIN = 1 / 3, 0.05

#: Seconds that the last words may take: the main thread may hold the stream they go to.
WORDS = 0.3

#: Ctrl-C so many times ends at once.
AT_ONCE = 3

#: A request from inside the program, among numbers of signals in the pipe.
_INSIDE = 0


class Late(Protocol):
    """What can save a training whose loop does not come back in time. Called from another thread."""

    @property
    def write_seconds(self) -> float:
        """Seconds that saving takes, as far as it is known."""

    def save(self, seconds: float) -> str:
        """Save what belongs to the last update, within so many seconds, and say so; empty where it was not possible."""

    def record(self, code: int, how: str) -> None:
        """The last words of the record."""


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
        self.late: Late | None = None
        """Saves where the loop does not come back in time."""
        self._grace = grace
        self._say = say
        self._notice = notice
        self._pressing = False
        self._counts: dict[int, int] = {}
        self._before: dict[int, Any] = {}
        self._over = threading.Event()
        self._wake_read, self._wake_write, self._wake_before = -1, -1, -1
        self._unread: list[int] = []
        """The other end of the pipe, once nobody reads it any more."""

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._wake_read, self._wake_write = os.pipe()
            os.set_blocking(self._wake_write, False)
            _open.add(self)
            for number in ASKING:
                self._before[number] = signal.signal(number, self._handle)
            self._wake_before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
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
            now = signal.set_wakeup_fd(self._wake_before)
            if now != self._wake_write:
                signal.set_wakeup_fd(now)  # somebody else's by now
            self._let_go()

    def _let_go(self) -> None:
        _open.discard(self)
        descriptor, self._wake_write = self._wake_write, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._close_unread()

    def _close_unread(self) -> None:
        with contextlib.suppress(IndexError):  # the other thread was first
            os.close(self._unread.pop())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._counts[number] = self._counts.get(number, 0) + 1
        if number == signal.SIGINT and self._counts[number] >= AT_ONCE:
            raise KeyboardInterrupt
        self._signalled(number)
        before = self._before.get(number)
        if sum(self._counts.values()) == 1 and callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # the handler that was there before keeps its say

    def _signalled(self, number: int) -> None:
        self._ask(signal.Signals(number).name, INTERRUPTED if number == signal.SIGINT else PREEMPTED)

    def _ask(self, why: str, code: int) -> None:
        # No lock: this is called from a handler. Twice at the same time does no harm.
        if code != INTERRUPTED and not self._pressing:
            # At a terminal nobody takes the machine away, and Ctrl-C again ends the run: there is no hurry until now.
            self.at, self._pressing = time.monotonic(), True
            self._wake()
        if not self.asked:
            self.why, self.code = why, code
            self.asked = True

    def _wake(self) -> None:
        if self._wake_write >= 0:
            try:
                os.write(self._wake_write, bytes([_INSIDE]))
            except OSError:
                pass

    def ask(self, why: str) -> None:
        """Ask from inside the program (another rank was asked, the notice command spoke)."""
        self._ask(why, PREEMPTED)

    @property
    def left(self) -> float:
        """Seconds of the grace that are left."""
        return self._grace - (time.monotonic() - self.at) if self._pressing else self._grace

    # -- the thread ---------------------------------------------------------------------------------------------

    def _watch_grace(self) -> None:
        """Hear of signals at once; end the process where the loop does not come back in time."""
        descriptor, forward = self._wake_read, self._wake_before
        try:
            while not self._pressing:
                numbers = os.read(descriptor, 64)
                if not numbers:
                    break
                for number in numbers:
                    if number in ASKING and signal.getsignal(number) == self._handle:
                        self._signalled(number)
                if forward >= 0:
                    os.write(forward, bytes(number for number in numbers if number != _INSIDE))
        except OSError:
            pass
        finally:
            self._unread.append(descriptor)
            # While signals go into the pipe its end stays open: Python would complain of each on standard error.
            if not self._pressing or self._wake_write < 0:
                self._close_unread()
        if self._pressing:
            self._guard()

    def _guard(self) -> None:
        import psutil  # noqa: F401  (not at the last moment)

        late, saved = self.late, ""
        needed = 2.0 * late.write_seconds + 0.5 if late is not None else 0.0
        if self._comes_back(min(PATIENCE * self._grace, self._grace - SPARE - needed)):
            return
        while self.left > SPARE:
            if late is not None and not saved:
                saved = late.save(self.left - SPARE)
            if saved and self._process_ends:
                break
            if self._comes_back(AGAIN):
                return
        text = saved or "the step under way did not end within the grace; the last checkpoint stands"
        self._end(f"{self.why}: {text}")

    def _comes_back(self, seconds: float) -> bool:
        """Whether the loop comes to its end within so many seconds."""
        until = time.monotonic() + seconds
        while not (self._over.is_set() or self.safe.is_set()):
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._over.wait(min(left, AGAIN))
        return True

    def _end(self, text: str) -> None:
        late = self.late
        if late is not None:
            within(WORDS, lambda: late.record(self.code, text))
        within(WORDS, lambda: self._say(text))
        within(WORDS, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        within(WORDS, children.end)
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


_open: weakref.WeakSet[StopRequest] = weakref.WeakSet()


def _forked() -> None:
    # A child shares the pipe: what it is sent must not be taken for a request to the process that trains.
    if _open:
        signal.set_wakeup_fd(-1)
    for request in list(_open):
        request._let_go()


os.register_at_fork(after_in_child=_forked)
