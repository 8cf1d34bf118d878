"""Text files the script writes (CSV, JSON, logs), copied as they grow to where the parent can read them.

Inside the isolation of a trial nobody else sees them.
"""

from __future__ import annotations

import builtins
import io
import os
import threading
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".log", ".txt")

#: More files, or bytes of one, are not looked at.
MOST_FILES, MOST_BYTES = 64, 64 * 2**20

LOOK_EVERY = 0.25


class Written:
    """Notes which text files are opened for writing, and copies what they grow by."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: an existing folder; the copies are `0.csv`, `1.json` and so on in it.
        """
        self._folder = folder
        self._pid = os.getpid()
        self._files: dict[str, tuple[Path, int]] = {}
        self._ended = threading.Event()
        self._open: Any = builtins.open
        self._lock = threading.Lock()

    def install(self) -> None:
        """Patch `open` and begin to copy."""
        builtins.open = io.open = self._opened
        threading.Thread(target=self._follow, name="upshift-written", daemon=True).start()

    def close(self) -> None:
        """Put `open` back and copy the rest."""
        if builtins.open == self._opened:
            builtins.open = io.open = self._open
        self._ended.set()
        self.copy()

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = self._open(file, mode, *args, **kwargs)
        if isinstance(mode, str) and not mode.startswith("r") and isinstance(file, (str, os.PathLike)):
            name = os.path.abspath(os.fsdecode(file))
            if name.endswith(SUFFIXES) and len(self._files) < MOST_FILES and os.getpid() == self._pid:
                kept = self._folder / f"{len(self._files)}{Path(name).suffix}"
                self._files.setdefault(name, (kept, 0))
        return opened

    def _follow(self) -> None:
        while not self._ended.wait(LOOK_EVERY):
            self.copy()

    def copy(self) -> None:
        """Copy what has been added since the last time."""
        with self._lock:
            for name, (kept, done) in list(self._files.items()):
                try:
                    size = os.stat(name).st_size
                    if size == done or size > MOST_BYTES:
                        continue
                    if size < done:
                        done = 0  # written anew: its lines follow those of before
                    with self._open(name, "rb") as source, self._open(kept, "ab") as copy:
                        source.seek(done)
                        data = source.read(size - done)
                        copy.write(data)
                except OSError:
                    continue
                self._files[name] = (kept, done + len(data))
