"""Trackers beside a run, each in a thread of its own: one that raises or hangs is dropped, the others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: Seconds between two polls.
EVERY = 1.0
#: Seconds that one call may take; the first one imports the tracker and may have to find its server.
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
        """Let each take in the rest and close; those that are not done in time are left behind."""
        for tracker in self._all:
            tracker.stop.set()
        until = time.monotonic() + PATIENCE
        for tracker in self._all:
            if not tracker.done.wait(max(until - time.monotonic(), 0.0)):
                tracker.drop(f"was not done {PATIENCE:g} s after the run")


class _Tracker:
    def __init__(self, spec: str, folder: Path, say: Callable[[str], None]) -> None:
        self.stop, self.done = threading.Event(), threading.Event()
        self._spec, self._folder, self._say = spec, folder, say
        self._dropped = False
        self._since: float | None = time.monotonic()
        self._limit = FIRST_PATIENCE
        threading.Thread(target=self._run, name=spec, daemon=True).start()

    def check(self) -> None:
        """Called from outside now and then."""
        since = self._since
        if since is not None and time.monotonic() - since > self._limit:
            self.drop(f"did not answer for {self._limit:g} s")

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
                self._since, self._limit = None, PATIENCE
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
