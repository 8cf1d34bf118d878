"""Records a process that upshift did not start itself.

The record is made with the first training step, so that a process that never trains leaves none; what was to be said
before is said then.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from upshift.errors import EnvironmentError_
from upshift.hook.guarded import RunController
from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.records.runlog import RunLog
from upshift.sites.runner import ChildSpec

#: Where launchers tell a process its rank, the surest first.
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class LateLog(RunLog):
    """A log whose folder is made with the first steps; what came before is kept until then."""

    def __init__(self, runs: Path, on_open: Callable[[], None]) -> None:
        self.folder = runs
        self.broken = ""
        self.opened = False
        self._on_open = on_open
        self._held: list[tuple[str, dict[str, Any]]] = []
        self._file = None

    def append(self, kind: str, **fields: Any) -> None:
        """See `RunLog.append`. A folder that cannot be made is remembered in `broken`."""
        if self.opened:
            if self._file is not None:
                super().append(kind, **fields)
            return
        self._held.append((kind, fields))
        if kind != "steps":
            return
        self.opened = True
        try:
            super().__init__(self._own_folder())
        except EnvironmentError_ as error:
            self.broken = error.message
        self._on_open()
        held, self._held = self._held, []
        for earlier, values in held:
            self.append(earlier, **values)

    def _own_folder(self) -> Path:
        """`rank1` below the launch, or the process id; both where that rank has been here before (a restart)."""
        number = own_rank()
        folder = self.folder / (f"rank{number}" if number else str(os.getpid()))
        return folder if not folder.exists() else folder.with_name(f"{folder.name}-{os.getpid()}")


def own_rank() -> str:
    """The rank of this process among its fellows; empty where nobody has told."""
    found = next((os.environ[name] for name in RANKS if os.environ.get(name)), "")
    return found if found.isdecimal() else ""


class FollowedController(RunController):
    """Records a process that somebody else started, from its first training step on."""

    def __init__(self, spec: ChildSpec) -> None:
        self._held: list[str] = []
        self._exits = Patches()
        self._exit: BaseException | None = None
        self._finished = False
        self._pid = os.getpid()
        super().__init__(spec)
        for note in spec.options.get("notes", ()):
            self._event("plan", note)
            if own_rank() in ("", "0"):
                self._print(note)

    def _open_log(self) -> RunLog:
        return LateLog(Path(self.spec.record), self._opened)

    def _opened(self) -> None:
        """It trains. Children of multiprocessing end without exit handlers, others without finalizers."""
        atexit.register(self._end)
        Finalize(None, self._end, exitpriority=-100)
        self._listen_to_exit()
        held, self._held = self._held, []
        for text in held:
            self._print(text)

    def _listen_to_exit(self) -> None:
        """Exit handlers do not hear the exit code."""
        original = sys.exit
        controller = self

        def leave(status: Any = None, /) -> Any:
            controller._exit = SystemExit(status)
            original(status)

        self._exits.set(sys, "exit", like(original, leave))

    def _end(self) -> None:
        if self._finished or os.getpid() != self._pid:
            return
        self._finished = True
        # A multiprocessing child is still inside its exception, elsewhere the interpreter keeps the one it has shown.
        self.finish(sys.exc_info()[1] or getattr(sys, "last_value", None) or self._exit)
        self._exits.close()
        self.stage.close()
        self.watch.close()

    def _print(self, text: str) -> None:
        if isinstance(self.log, LateLog) and not self.log.opened:
            self._held.append(text)
            return
        number = own_rank()
        super()._print(f"rank {number}: {text}" if number else f"process {os.getpid()}: {text}")
