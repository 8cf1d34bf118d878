"""Trackers beside a run, each in a thread of its own: one that raises or hangs is dropped, the others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: Seconds between two polls.
EVERY = 1.0
#: Seconds that one call may take; while the tracker opens, which imports it and may have to find its server, so many.
#: The same hold after the run: one that is still opening then may open, and then write what there is.
PATIENCE, FIRST_PATIENCE = 30.0, 120.0


class Trackers:
    """All trackers of a run.

    Args:
        say: told in a line what became of a tracker; called from any thread.
    """

    def __init__(self, specs: Sequence[str], folder: Path, say: Callable[[str], None]) -> None:
        self._all = [_Tracker(spec, folder, say) for spec in specs]

    def check(self) -> None:
        """Drop those that hang."""
        for tracker in self._all:
            tracker.check()

    def close(self) -> None:
        """Let each open, take in the rest and close; those that are not done in time are left behind.

        The run is over by then, and nobody waits for this.
        """
        for tracker in self._all:
            tracker.stop.set()
        stopped = time.monotonic()
        for tracker in self._all:
            tracker.await_end(stopped)


class _Tracker:
    def __init__(self, spec: str, folder: Path, say: Callable[[str], None]) -> None:
        self.stop, self.done = threading.Event(), threading.Event()
        self._spec, self._folder, self._say = spec, folder, say
        self._dropped = False
        self._since: float | None = time.monotonic()
        self._limit = FIRST_PATIENCE
        self._opened: float | None = None
        threading.Thread(target=self._run, name=spec, daemon=True).start()

    def check(self) -> None:
        """Called from outside now and then."""
        since = self._since
        if since is not None and time.monotonic() - since > self._limit:
            self.drop(f"did not answer for {self._limit:g} s")

    def await_end(self, stopped: float) -> None:
        """Wait until it is done, as long as it may take.

        Args:
            stopped: when the run was over, as `time.monotonic` tells it.
        """
        while not self.done.is_set():
            opened = self._opened
            limit = FIRST_PATIENCE if opened is None else PATIENCE
            left = max(stopped, opened or 0.0) + limit - time.monotonic()
            if left <= 0.0:
                what = "was not open" if opened is None else "was not done"
                self.drop(f"{what} {time.monotonic() - stopped:.0f} s after the run")
            else:
                # Whether it has opened meanwhile is looked at again.
                self.done.wait(min(left, EVERY))

    def drop(self, why: str) -> None:
        """Poll it no more. What it hangs in cannot be ended: its thread is left to itself."""
        if not self._dropped and not self.done.is_set():
            self._dropped = True
            self.done.set()
            # A tracker's address may hold a password.
            self._say(f"the tracker {self._spec.partition(':')[0]} is dropped: it {why}")

    def _run(self) -> None:
        try:
            from upshift.sinks.trackers import open_sinks

            (sink,) = open_sinks([self._spec], self._folder)
            while not self._dropped:
                self._since = time.monotonic()
                last = self.stop.is_set()
                sink.poll()
                if sink.opened and self._opened is None:
                    self._opened, self._limit = time.monotonic(), PATIENCE
                self._since = None
                if last:
                    self._since = time.monotonic()
                    sink.close()
                    break
                self.stop.wait(EVERY)
        except BaseException as error:  # a library may even try to end the process
            self.drop(f"failed ({type(error).__name__}: {error})")
        finally:
            self._since = None
            self.done.set()
