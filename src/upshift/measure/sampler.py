"""Which lines of the user's own code the training thread spends its time in.

A daemon thread looks at the training thread's stack about a hundred times a second, at a jittered period so that it
cannot beat with the training step, and charges the time since its last look to the innermost frame of the user's own
code. Weighing by time makes up for looks that came late because the interpreter lock was held.

Bias: the stack is only seen where the interpreter lock is released or handed over. A long call that holds it is charged
in full, but may be charged to the line after it. Time inside other threads and in loader workers is not seen.
"""

from __future__ import annotations

import linecache
import math
import random
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Literal

from upshift.records.measurement import LineCost
from upshift.records.quantity import Quantity

#: Where PyTorch's DataLoader calls the dataset.
_FETCH = "torch/utils/data/_utils/fetch.py"

#: A line of source longer than this is cut.
_LONGEST_LINE = 200

Kind = Literal["host", "data"]
Place = tuple[CodeType, int, Kind]


def wilson(successes: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Two-sided interval of a binomial share (Wilson 1927), 95 % by default; (0, 1) without observations."""
    if n <= 0:
        return 0.0, 1.0
    share = min(1.0, max(0.0, successes / n))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At a share of 0 or 1 the end equals it but for rounding.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


class HostSampler:
    """Samples one thread.

    Args:
        thread_id: `threading.get_ident()` of the training thread.
        is_user_file: whether a file (its path as in the code object) is the user's own code.
        hz: looks per second, on average.

    It counts from `start()` on; what `pause()` and `resume()` enclose (warm-up, evaluation) is left out.
    """

    def __init__(self, thread_id: int, is_user_file: Callable[[str], bool], hz: float = 100.0) -> None:
        if not hz > 0:
            raise ValueError(f"hz must be above 0, got {hz!r}")
        self._thread_id = thread_id
        self._is_user_file = is_user_file
        self._period = 1.0 / hz
        self._jitter = random.Random(0x5EED)  # its own: the script's random numbers stay as they are
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._counting = False
        self._last = 0.0
        self._seconds: dict[Place, float] = {}
        self._watched = 0.0
        self._squares = 0.0
        self._looks = 0
        self._spent = self._alive = 0.0
        self._kinds: dict[CodeType, Literal["user", "fetch", ""]] = {}

    @property
    def looks(self) -> int:
        """How many looks counted."""
        return self._looks

    @property
    def watched(self) -> float:
        """Seconds that counted."""
        return self._watched

    def cpu_share(self) -> float:
        """Processor time of the sampling thread per second of wall time (fraction): what sampling costs."""
        return self._spent / self._alive if self._alive > 0 else 0.0

    def start(self) -> None:
        """Start the sampling thread, and count from now on."""
        if self._thread is not None:
            raise RuntimeError("this sampler was started before; make a new one")
        self._thread = threading.Thread(target=self._run, name="upshift-sampler", daemon=True)
        self.resume()
        self._thread.start()

    def resume(self) -> None:
        """Count from now on."""
        with self._lock:
            if not self._counting:
                self._counting, self._last = True, time.perf_counter()

    def pause(self) -> None:
        """Do not count what follows."""
        with self._lock:
            self._counting = False

    def stop(self) -> tuple[LineCost, ...]:
        """End sampling and return `lines()`. May be called twice."""
        self.pause()
        self._end.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=2.0)
        return self.lines()

    def _run(self) -> None:
        begun, spent = time.perf_counter(), time.thread_time()
        while not self._end.wait(self._period * self._jitter.uniform(0.5, 1.5)):
            if not self._counting:
                continue
            # Identifiers are used again: this thread may have got that of a training thread which has ended.
            frame = sys._current_frames().get(self._thread_id) if self._thread_id != threading.get_ident() else None
            place = self._place(frame)
            self._spent, self._alive = time.thread_time() - spent, time.perf_counter() - begun
            del frame  # a frame kept alive keeps the script's tensors alive
            with self._lock:
                if not self._counting:
                    continue
                now = time.perf_counter()
                elapsed, self._last = now - self._last, now
                self._looks += 1
                self._watched += elapsed
                self._squares += elapsed * elapsed
                if place is not None:
                    self._seconds[place] = self._seconds.get(place, 0.0) + elapsed

    def _place(self, frame: FrameType | None) -> Place | None:
        """Innermost user line of a stack, and whether the loader was fetching."""
        code: CodeType | None = None
        line, fetching = 0, False
        while frame is not None:
            kind = self._kinds.get(frame.f_code)
            if kind is None:
                kind = self._kinds.setdefault(frame.f_code, self._classify(frame.f_code.co_filename))
            if kind == "user" and code is None:
                code, line = frame.f_code, frame.f_lineno or frame.f_code.co_firstlineno
            elif kind == "fetch" and not fetching:
                # With no user code inside the dataset, the walk goes on to the line that asked for the batch.
                fetching = True
            if code is not None and fetching:
                return code, line, "data"
            frame = frame.f_back
        return None if code is None else (code, line, "host")

    def _classify(self, file: str) -> Literal["user", "fetch", ""]:
        if file.replace("\\", "/").endswith(_FETCH):
            return "fetch"
        try:
            return "user" if self._is_user_file(file) else ""
        except Exception:  # a predicate that fails must not end the sampling
            return ""

    def lines(self, least: float = 0.005) -> tuple[LineCost, ...]:
        """Time per line, most first; lines under the share `least` are left out.

        `share` is of the time that counted, `seconds` the line's part of it in total (not per step). The interval takes
        looks as independent, with the effective number of equally long ones.
        """
        with self._lock:
            seconds, watched, squares, looks = dict(self._seconds), self._watched, self._squares, self._looks
        if watched <= 0 or squares <= 0:
            return ()
        effective = watched * watched / squares
        summed: dict[tuple[str, int, str, Kind], float] = {}
        for (code, line, kind), spent in seconds.items():
            key = (code.co_filename, line, code.co_name, kind)
            summed[key] = summed.get(key, 0.0) + spent
        found = []
        for (file, line, function, kind), spent in sorted(summed.items(), key=lambda item: -item[1]):
            share = spent / watched
            if share < least:
                continue
            low, high = wilson(share * effective, effective)
            found.append(
                LineCost(
                    file=file,
                    line=line,
                    function=function,
                    text=source_line(file, line),
                    kind=kind,
                    share=Quantity(value=share, unit="fraction", low=low, high=high, n=looks),
                    seconds=Quantity(value=spent, unit="s", low=low * watched, high=high * watched, n=looks),
                )
            )
        return tuple(found)


def source_line(file: str, line: int) -> str:
    """The text of a source line without its indentation; empty where it cannot be read."""
    try:
        text = linecache.getline(file, line).strip()
    except Exception:  # linecache meets whatever the user's disk and loaders hold
        return ""
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 1] + "…"
