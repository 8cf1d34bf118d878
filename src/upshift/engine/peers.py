"""What ranks say of themselves, and what can be seen of the processes of this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil


class Progress:
    """What the main thread is doing; written by it alone, read by the watch."""

    __slots__ = ("calls", "name", "phase", "since", "step", "steps", "waiting")

    def __init__(self) -> None:
        self.step = 0
        self.steps = 0
        self.phase = "training"
        self.calls = 0
        self.name = ""
        self.waiting = False

    def enter(self, name: str) -> None:
        """A collective begins."""
        self.name = name
        self.calls += 1
        self.waiting = True

    def leave(self) -> None:
        """It is over."""
        self.waiting = False


class Beat(msgspec.Struct):
    """What a rank says of itself once a second."""

    n: int
    step: int
    phase: str
    calls: int
    waits_in: str = ""


class Peer(msgspec.Struct, frozen=True):
    """Where a rank runs; `stack` is the file that its stacks are written to on a signal."""

    rank: int
    host: str
    pid: int
    stack: str = ""


def machine() -> str:
    """The same text for processes that can see each other."""
    told = [socket.gethostname()]
    try:
        told += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        pass
    return " ".join(told)


def process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def state_of(process: psutil.Process | None) -> str:
    """`gone`, `stopped`, or nothing in particular."""
    try:
        if process is None or not process.is_running():
            return "gone"
        status = process.status()
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return ""
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "gone"
    return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else ""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of something that may never return; None after `seconds` or an error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
