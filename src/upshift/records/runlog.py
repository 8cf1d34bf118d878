"""The append-only log of a run (JSON lines) and its fold into a `Run`. Readable after `kill -9`."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from upshift.errors import EnvironmentError_, RecordError
from upshift.records.run import Event, Run, Window

LOG = "log.jsonl"

_NAME_A_RUN = "Name a folder below .upshift/runs."

#: Windows kept in a folded run; longer logs are thinned by merging neighbours.
MOST_WINDOWS = 4096

#: More events than any run has; a longer line is not one of ours.
MOST_EVENTS = 10_000
MAX_LINE = 1 << 20


class RunLog:
    """Appends events to `<folder>/log.jsonl`, one write a line, so that a kill tears at most the last line."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            EnvironmentError_: the folder cannot be made or written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise EnvironmentError_(
                f"the run folder {folder} cannot be written: {error.strerror}.",
                remedy="Free some space, or name another folder with --runs DIR.",
            ) from None
        self.folder = folder
        self.broken = ""
        self._file = self._identity()
        self._torn = False

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._fd)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def append(self, kind: str, **fields: Any) -> None:
        """Append one event. A full disk is remembered in `broken`, never raised: training goes on."""
        line = msgspec.json.encode({"kind": kind, **fields}) + b"\n"
        if self._file is None or self._identity() != self._file:
            # A script may close every descriptor; the number may be a file of its own by now.
            self.broken = "its file was closed by the script"
            return
        try:
            # After a write cut short the next line starts anew.
            written = os.write(self._fd, b"\n" + line if self._torn else line)
            self._torn = written < len(line)
            if self._torn:
                self.broken = os.strerror(errno.ENOSPC)
        except OSError as error:
            self.broken = error.strerror or str(error)

    def close(self) -> None:
        """Close the file, if it is still ours."""
        if self._file is not None and self._identity() == self._file:
            os.close(self._fd)
        self._file = None


def new_id() -> str:
    """A run id that sorts by start time: `20261121-104500-4242`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE):
            if line == b"\n":
                continue
            try:
                found = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                yield None
                continue
            yield found if isinstance(found, dict) and isinstance(found.get("kind"), str) else None


class _Folded:
    """What has been read of a log so far."""

    def __init__(self) -> None:
        self.start: _Start | None = None
        self.end: _End | None = None
        self.windows: list[Window] = []
        self.events: list[Event] = []
        self.torn = 0

    def add(self, item: dict[str, Any]) -> None:
        kind = item.pop("kind")
        if kind == "start":
            self.start = msgspec.convert(item, _Start)
        elif kind == "techniques" and self.start is not None:
            # A run that tuned itself: what stayed on.
            self.start.techniques = msgspec.convert(item["techniques"], _Techniques)
        elif kind == "end":
            self.end = msgspec.convert(item, _End)
        elif kind == "steps":
            self.windows.append(msgspec.convert(item, Window))
            if len(self.windows) > 2 * MOST_WINDOWS:
                self.windows = _thin(self.windows)
        elif len(self.events) < MOST_EVENTS:
            self.events.append(msgspec.convert({"at": 0.0, "text": "", **item, "kind": kind}, Event))


_Techniques = dict[str, dict[str, bool | int | float | str]]


class _Start(msgspec.Struct):
    script: str
    arguments: tuple[str, ...]
    started: str
    pid: int = 0
    clock: float | None = None
    plan: str = ""
    techniques: _Techniques = {}
    environment: dict[str, str] = {}


class _End(msgspec.Struct):
    code: int | None = None
    seconds: float | None = None


def fold(folder: Path) -> Run:
    """The run recorded in `folder`. Lines that cannot be read are counted in `torn_lines`.

    Raises:
        RecordError: no log there, or one that does not begin like ours.
    """
    found = _Folded()
    try:
        for item in _lines(folder / LOG):
            try:
                if item is None:
                    found.torn += 1
                else:
                    found.add(item)
            except msgspec.ValidationError:
                found.torn += 1
    except OSError as error:
        raise RecordError(f"{folder} holds no readable run: {error.strerror}.", remedy=_NAME_A_RUN) from None
    head, end, windows = found.start, found.end, found.windows
    if head is None:
        raise RecordError(f"{folder} holds no readable run.", remedy=_NAME_A_RUN)
    if len(windows) > MOST_WINDOWS:
        windows = _thin(windows)
    status: Literal["running", "finished", "failed", "interrupted", "unknown"] = "unknown"
    if end is not None:
        status = "finished" if end.code == 0 else "interrupted" if end.code == 130 else "failed"
    elif _alive(head.pid, head.clock):
        status = "running"
    last = windows[-1] if windows else None
    return Run(
        id=folder.name,
        script=head.script,
        arguments=head.arguments,
        started=head.started,
        status=status,
        exit_code=end.code if end else None,
        seconds=end.seconds if end else (last.at if last else None),
        plan=head.plan,
        techniques=head.techniques,
        steps=last.first + last.n if last else 0,
        windows=tuple(windows),
        events=tuple(found.events),
        environment=head.environment,
        guard_fired=any(item.kind == "guard" for item in found.events),
        torn_lines=found.torn,
    )


def _thin(windows: list[Window]) -> list[Window]:
    """Merge neighbours two by two; sums stay exact, losses are averaged by steps."""
    merged = []
    for a, b in zip(windows[::2], windows[1::2], strict=False):
        n = a.n + b.n
        loss = None
        if a.loss is not None and b.loss is not None:
            loss = (a.loss * a.n + b.loss * b.n) / max(n, 1)
        phases = {k: a.phases.get(k, 0.0) + b.phases.get(k, 0.0) for k in {**a.phases, **b.phases}}
        merged.append(
            Window(
                first=a.first,
                n=n,
                at=b.at,
                seconds=a.seconds + b.seconds,
                phases=phases,
                loss=loss,
                last_loss=b.last_loss,
                evaluation=a.evaluation + b.evaluation,
                checkpoint=a.checkpoint + b.checkpoint,
            )
        )
    return merged + windows[len(merged) * 2 :]


def _alive(pid: int, clock: float | None) -> bool:
    """Whether the process that began the log at `clock` (seconds since the epoch) still runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        # A process younger than the log has only been given the same number.
        return process.status() != psutil.STATUS_ZOMBIE and (clock is None or process.create_time() <= clock + 1.0)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False
