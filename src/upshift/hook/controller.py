"""What a hooked process does at the end of every step; one subclass per mode."""

from __future__ import annotations

import os
import signal
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from upshift.measure.steps import StepRecord
from upshift.sites import Stage

if TYPE_CHECKING:
    from upshift.hook.watch import Watch


class Controller:
    """Base: watches and does nothing."""

    stage: Stage
    watch: Watch
    #: Called with the loss of every backward call; None keeps the hot path free of it.
    on_loss: Any = None
    #: Seconds of steps to sum before `on_step` is called; 0 for every step on its own.
    window: float = 0.0

    def attach(self, stage: Stage, watch: Watch) -> None:
        """Hand over what is controlled, before the script starts."""
        self.stage = stage
        self.watch = watch

    def torch_ready(self, torch: ModuleType) -> None:
        """torch has been imported and patched."""

    def say(self, kind: str, name: str, text: str) -> None:
        """Something happened to a technique."""

    def on_step(self, record: StepRecord) -> None:
        """A global step has ended."""

    def logged(self, values: dict[str, float]) -> None:
        """The script has logged metrics."""

    def rescue(self, module: Any, names: tuple[str, ...], error: Exception) -> None:
        """A technique, or the script's own code inside it, raised in a forward call. Return to go on without."""
        raise error

    def finish(self, error: BaseException | None) -> None:
        """The script has ended."""


def stand_still() -> NoReturn:
    """Stop this process with all its threads until the parent kills it; nothing of the script runs any more.

    Unwinding would run `finally` and bare `except` blocks, and a script that trains in a thread has a main thread.
    Whoever continues the process ends it.
    """
    # To this thread, so that it does not return from the call before the process stops.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    os._exit(0)


def exit_code(error: BaseException | None) -> int:
    """The exit code `python` would give for this ending."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code & 0xFF if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def describe(error: BaseException | None) -> str:
    """An ending in one line."""
    if error is None:
        return "ended by itself"
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r})"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
