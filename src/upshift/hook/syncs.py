"""Where the host waits for the device, and what it copies there. Diagnosis only, accelerators only.

A synchronisation is a call that cannot return before the device has caught up: `.item()`, `.tolist()`, `.cpu()`,
`.numpy()`, `bool(tensor)`, `torch.cuda.synchronize()` and copies from the device. They are found by the tensor
methods that cause them; ones hidden inside operations (`nonzero`, boolean indexing) are found by the name of those
operations. No synchronisation is added. Untested on CUDA.
"""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from upshift.hook.patch import Patches
from upshift.records import LineCost, Quantity

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Methods of a device tensor that wait for it.
WAITING = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "masked_select",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
)
#: Methods that may copy between host and device.
COPYING = ("to", "cuda", "copy_")


class Syncs:
    """Counts waits by line of the user's code and adds them to the step's `sync` and `h2d` phases."""

    def __init__(
        self,
        watch: Watch,
        is_user_file: Callable[[str], bool],
        on_device: Callable[[Any], bool] = lambda tensor: tensor.device.type != "cpu",
    ) -> None:
        self._watch = watch
        self._is_user_file = is_user_file
        self._on_device = on_device
        self._patches = Patches()
        self._busy = False
        self._waits: dict[tuple[str, int, str], list[float]] = defaultdict(lambda: [0.0, 0])

    def install(self, torch: Any) -> None:
        """Wrap the methods that wait."""
        tensor = torch.Tensor
        for name in WAITING:
            self._patches.set(tensor, name, self._waiting(getattr(tensor, name)))
        for name in COPYING:
            self._patches.set(tensor, name, self._copying(getattr(tensor, name)))
        synchronize = torch.cuda.synchronize

        def waits(*args: Any, **kwargs: Any) -> Any:
            return self._timed(True, synchronize, args, kwargs)

        self._patches.set(torch.cuda, "synchronize", waits)

    def close(self) -> None:
        """Take the wrappers out."""
        self._patches.close()

    def _waiting(self, original: Any) -> Any:
        def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if self._busy or not self._on_device(tensor):
                return original(tensor, *args, **kwargs)
            return self._timed(True, original, (tensor, *args), kwargs)

        return method

    def _copying(self, original: Any) -> Any:
        def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return original(tensor, *args, **kwargs)
            source = args[0] if original.__name__ == "copy_" and args else tensor
            before = self._on_device(source)
            start = time.perf_counter()
            result = original(tensor, *args, **kwargs)
            after = self._on_device(result)
            if before != after:
                self._note(before, time.perf_counter() - start)
            return result

        return method

    def _timed(self, wait: bool, call: Any, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        self._busy = True
        try:
            return call(*args, **kwargs)
        finally:
            self._busy = False
            self._note(wait, time.perf_counter() - start)

    def _note(self, wait: bool, took: float) -> None:
        watch = self._watch
        if threading.get_ident() != watch.thread:
            return
        if wait:
            watch.sync += took
            found = self._waits[self._line()]
            found[0] += took
            found[1] += 1
        else:
            watch.h2d += took
        watch.accounted += took
        watch.inner += took

    def _line(self) -> tuple[str, int, str]:
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if self._is_user_file(name):
                return name, frame.f_lineno, frame.f_code.co_name
            if frame.f_back is None:
                break
            frame = frame.f_back
        return "unknown", 0, ""

    def lines(self, steps: int, step_seconds: float) -> tuple[LineCost, ...]:
        """Waits by line, the dearest first: seconds a step, and their share of it."""
        found = []
        for (file, line, function), (seconds, count) in sorted(self._waits.items(), key=lambda item: -item[1][0]):
            each = seconds / max(steps, 1)
            found.append(
                LineCost(
                    file=file,
                    line=line,
                    function=function,
                    text=linecache.getline(file, line).strip(),
                    kind="sync",
                    share=Quantity(
                        value=each / step_seconds if step_seconds > 0 else None, unit="fraction", n=int(count)
                    ),
                    seconds=Quantity(value=each, unit="s", n=int(count)),
                )
            )
        return tuple(found[:20])
