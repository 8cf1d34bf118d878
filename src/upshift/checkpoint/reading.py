"""Reads checkpoints that anybody may have written: names, sizes and digests first, then the contents, all bounded."""

from __future__ import annotations

import os
from pathlib import Path

from upshift.checkpoint import disk as io
from upshift.checkpoint import manifest as manifests
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.manifest import MANIFEST, STATE, Manifest
from upshift.checkpoint.opened import Opened, memory
from upshift.checkpoint.retention import Checkpoint
from upshift.checkpoint.states import MAX_STATE
from upshift.errors import CheckpointError


class Reader:
    """What lies in one `checkpoints/` folder. `known` maps a name to what is wrong with it ("" is whole)."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder = folder
        self.known: dict[str, str] = {}
        self._disk = disk

    def names(self) -> list[str]:
        """Folders that bear the name of a checkpoint; links do not count."""
        try:
            with os.scandir(self.folder) as entries:
                return [e.name for e in entries if manifests.parse_name(e.name) and e.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def manifest(self, name: str) -> Manifest:
        """The manifest of a checkpoint. Raises CheckpointError, OSError."""
        return manifests.read(io.small(self._disk, self.folder / name, MANIFEST, manifests.MAX_BYTES), name)

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint by its manifest alone; where that cannot be read, by its name, with `problem`."""
        parts = manifests.parse_name(name)
        if parts is None:
            raise CheckpointError(f"{name!r:.80} is no checkpoint.")
        step, attempt, serial = parts
        try:
            found = self.manifest(name)
        except (CheckpointError, OSError) as error:
            problem = _text(error, MANIFEST)
            return Checkpoint(self.folder / name, step, attempt, serial, verified=False, problem=problem)
        known = self.known.get(name)
        return Checkpoint(
            path=self.folder / name,
            step=found.step,
            attempt=attempt,
            serial=serial,
            world=found.world,
            bytes=sum(file.size for file in found.files.values()),
            best=found.best,
            before_spike=found.before_spike,
            created=found.created,
            versions=found.versions,
            facts=found.facts,
            verified=None if known is None else not known,
            problem=known or "",
        )

    def problem(self, name: str) -> str:
        """What is wrong with a checkpoint, after reading every byte of it; empty when it is whole."""
        try:
            found = self.manifest(name)
        except (CheckpointError, OSError) as error:
            return _text(error, MANIFEST)
        return next((text for file in found.files if (text := self.file_problem(name, file, found))), "")

    def file_problem(self, name: str, file: str, manifest: Manifest) -> str:
        """What is wrong with one file of a checkpoint; empty when size and digest are those of the manifest."""
        try:
            with io.opened(self.folder / name, file) as fd:
                return self._differs(fd, file, manifest)
        except (CheckpointError, OSError) as error:
            return _text(error, file)

    def open(self, name: str, rank: int) -> Opened:
        """A checkpoint to be read by a rank.

        Raises:
            CheckpointError, OSError: its manifest is damaged, or cannot be read.
        """
        return Opened(self._disk, self.folder / name, self.manifest(name), self._check, rank)

    def _check(self, fd: int, file: str, manifest: Manifest) -> None:
        if problem := self._differs(fd, file, manifest):
            raise CheckpointError(f"{problem}.")

    def _differs(self, fd: int, file: str, manifest: Manifest) -> str:
        expected, status = manifest.files[file], os.fstat(fd)
        size = status.st_size
        if size != expected.size:
            return f"{file} has {size:,} bytes instead of {expected.size:,}"
        if file == STATE and size > MAX_STATE:
            return f"{STATE} has {size:,} bytes, more than {MAX_STATE:,}"
        # A file that claims terabytes and holds none would keep us reading zeros for hours.
        if status.st_blocks * 512 < size // 64 and size > memory():
            return f"{file} claims {size:,} bytes and holds {status.st_blocks * 512:,}"
        if io.digest(self._disk, fd) != expected.sha256:
            return f"{file} is damaged (its digest differs)"
        return ""


def _text(error: Exception, file: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{file} is missing"
    if isinstance(error, OSError):
        return f"{file} cannot be read: {error.strerror or error}"
    return getattr(error, "message", str(error)).rstrip(".")
