"""The Runner protocol: how the search starts child processes without knowing how they are hooked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from upshift.records.plan import Setting

Mode = Literal["run", "diagnose", "arm"]


class ChildSpec(msgspec.Struct, frozen=True):
    """What one child process is asked to do. Travels as JSON; nothing in it can import or execute anything.

    `plan` maps technique names to settings.
    """

    mode: Mode
    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    plan: dict[str, dict[str, Setting]] = {}
    options: dict[str, Any] = {}
    seed: int | None = None
    isolate: bool = True
    scratch: str = ""
    record: str = ""
    """Folder for what must really be written (records); kept out of the isolation."""


class Child(Protocol):
    """A running child. Messages are JSON objects with a `kind`."""

    name: str
    record: Path

    @property
    def pid(self) -> int:
        """The main process; its number stays its own until `kill`."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Raises `ChildGone` if the child has ended."""

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None after `timeout` seconds. A final message has kind `gone`."""

    def pause(self) -> None:
        """Stop the whole process group (SIGSTOP), so that it takes no time from the other arm."""

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""

    def kill(self) -> None:
        """End the whole process group and clean up. May be called twice."""

    def memory(self) -> tuple[int, int]:
        """Bytes this child and its processes hold, and bytes still available on the machine."""

    def written(self) -> list[Path]:
        """Text files the script has written so far: its output first, then logged scalars, CSV, JSON and logs."""

    def output(self) -> str:
        """The tail of what the script wrote on stdout and stderr."""


class Runner(Protocol):
    """Starts children."""

    def start(self, spec: ChildSpec, *, name: str = "") -> Child:
        """Start a child process for this spec."""


class ChildGone(Exception):
    """The child ended before it answered."""
