"""The append-only log of a run (JSON lines) and its fold into a `Run`. Readable after `kill -9`."""

from __future__ import annotations

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

    def append(self, kind: str, **fields: Any) -> None:
        """Append one event. A full disk is remembered in `broken`, never raised: training goes on."""
        line = msgspec.json.encode({"kind": kind, **fields}) + b"\n"
        try:
            os.write(self._fd, line)
        except OSError as error:
            self.broken = error.strerror or str(error)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def new_id() -> str:
    """A run id that sorts by start time: `20261121-104500-4242`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    with open(path, "rb") as file:
        for line in file:
            try:
                found = msgspec.json.decode(line)
            except msgspec.DecodeError:
                yield None
                continue
            yield found if isinstance(found, dict) else None


def fold(folder: Path) -> Run:
    """The run recorded in `folder`.

    Raises:
        RecordError: no log there, or one that does not begin like ours.
    """
    path = folder / LOG
    head: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    windows: list[Window] = []
    events: list[Event] = []
    torn = 0
    try:
        for item in _lines(path):
            if item is None:
                torn += 1
            elif item["kind"] == "start":
                head = item
            elif item["kind"] == "end":
                end = item
            elif item["kind"] == "steps":
                windows.append(msgspec.convert({k: v for k, v in item.items() if k != "kind"}, Window))
                if len(windows) > 2 * MOST_WINDOWS:
                    windows = _thin(windows)
            else:
                events.append(Event(at=item.get("at", 0.0), kind=str(item["kind"]), text=str(item.get("text", ""))))
    except (OSError, KeyError, msgspec.ValidationError) as error:
        raise RecordError(
            f"{folder} holds no readable run: {error}.", remedy="Name a folder below .upshift/runs."
        ) from None
    if head is None:
        raise RecordError(f"{folder} holds no readable run.", remedy="Name a folder below .upshift/runs.")
    if len(windows) > MOST_WINDOWS:
        windows = _thin(windows)
    status: Literal["running", "finished", "failed", "interrupted", "unknown"] = "unknown"
    if end is not None:
        code = end.get("code")
        status = "finished" if code == 0 else "interrupted" if code == 130 else "failed"
    elif _alive(head.get("pid")):
        status = "running"
    last = windows[-1] if windows else None
    return Run(
        id=folder.name,
        script=head["script"],
        arguments=tuple(head["arguments"]),
        started=head["started"],
        status=status,
        exit_code=end.get("code") if end else None,
        seconds=end.get("seconds") if end else (last.at if last else None),
        plan=head.get("plan", ""),
        techniques=head.get("techniques", {}),
        steps=last.first + last.n if last else 0,
        windows=tuple(windows),
        events=tuple(events),
        environment=head.get("environment", {}),
        guard_fired=any(item.kind == "guard" for item in events),
        torn_lines=torn,
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


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
