"""Reads checkpoints that anybody may have written: names, sizes and digests first, then the contents, all bounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from upshift.checkpoint import disk as io
from upshift.checkpoint import manifest as manifests
from upshift.checkpoint import tensors as files
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.manifest import MANIFEST, STATE, Manifest, rank_file
from upshift.checkpoint.retention import Checkpoint
from upshift.checkpoint.tree import Tensors
from upshift.errors import CheckpointError

#: A larger state.json is refused. A training of 10,000 parameters takes about 5 MB of it.
MAX_STATE = 32 * 2**20

#: Brackets and commas in a rank's part, which bound how many values parsing can make: at most about 60 MB of them.
MAX_SIGNS = 1_500_000


_LONG = "Keep long lists of numbers in tensors."


class _Rank(msgspec.Struct, forbid_unknown_fields=True):
    tree: Any
    dtypes: dict[str, str] = {}


class _State(msgspec.Struct, forbid_unknown_fields=True):
    schema: int
    ranks: list[msgspec.Raw]


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

    def rank(self, name: str, manifest: Manifest, rank: int) -> tuple[Any, Tensors]:
        """Skeleton and tensors of one rank; each file is checked and read through one descriptor.

        Raises:
            CheckpointError, OSError: damaged, or cannot be read.
        """
        folder = self.folder / name
        with io.opened(folder, STATE) as fd:
            self._check(fd, STATE, manifest)
            data = bytearray(manifest.files[STATE].size)
            io.fill(self._disk, fd, memoryview(data))
        state = self._state(data, manifest.world, rank)
        file = rank_file(rank, manifest.world)
        with io.opened(folder, file) as fd:
            self._check(fd, file, manifest)
            if (size := manifest.files[file].size) > (most := _memory()):
                raise CheckpointError(f"{file} has {size:,} bytes, more than this machine has memory ({most:,}).")
            try:
                return state.tree, files.read(self._disk, fd, state.dtypes)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error.message}") from None

    def _state(self, data: bytearray, world: int, rank: int) -> _Rank:
        try:
            state = msgspec.json.decode(data, type=_State)
            if state.schema != 1 or len(state.ranks) != world:
                raise CheckpointError(f"{STATE} belongs to another version or number of ranks.")
            check_values(bytes(state.ranks[rank]))
            return msgspec.json.decode(state.ranks[rank], type=_Rank)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{STATE} cannot be read: {error!s:.200}.") from None

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
        if status.st_blocks * 512 < size // 64 and size > _memory():
            return f"{file} claims {size:,} bytes and holds {status.st_blocks * 512:,}"
        if io.digest(self._disk, fd) != expected.sha256:
            return f"{file} is damaged (its digest differs)"
        return ""


def state_file(ranks: list[Any]) -> bytes:
    """The bytes of state.json, a part per rank.

    Raises:
        CheckpointError: larger than what is read back.
    """
    parts = [msgspec.json.encode(part) for part in ranks]
    for part in parts:
        check_values(part)
    data = msgspec.json.encode(_State(1, [msgspec.Raw(part) for part in parts]))
    if len(data) > MAX_STATE:
        raise CheckpointError(f"{STATE} has {len(data):,} bytes, more than {MAX_STATE:,}.", remedy=_LONG)
    return data


def check_values(part: bytes) -> None:
    """Raises CheckpointError where a rank's part holds more values than are read back."""
    # Every value but the first follows a bracket or a comma.
    if (signs := sum(part.count(sign) for sign in (b"[", b"{", b","))) > MAX_SIGNS:
        raise CheckpointError(f"{STATE} holds up to {signs:,} values, more than {MAX_SIGNS:,}.", remedy=_LONG)


def _memory() -> int:
    """Bytes of memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)


def _text(error: Exception, file: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{file} is missing"
    if isinstance(error, OSError):
        return f"{file} cannot be read: {error.strerror or error}"
    return getattr(error, "message", str(error)).rstrip(".")
