"""The checkpoints of one run folder: written whole or not at all, verified, found again, kept within bounds.

    RUN/checkpoints/
        lock, attempt.json            who owns the folder
        step-1200-a1/                 rank-0-of-1.safetensors (one per rank), state.json, manifest.json
        quarantine/                   what could not be verified, or was gone back from
        .tmp-*, .trash-*              unfinished writes and deletions; removed by the next owner

A save: own files into a temporary folder beside the final one, each synced -> rank 0 gathers the digests, writes and
syncs the manifest -> rename, sync of the parent -> every rank reads its file again -> only now older ones are deleted
(renamed to the trash, the rename synced, then removed). The order of calls that survives a power loss is that of
Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), 4.4.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from msgspec.structs import replace as replace_fields

from upshift.checkpoint import disk as io
from upshift.checkpoint import manifest as manifests
from upshift.checkpoint import tensors as files
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.lock import Lock
from upshift.checkpoint.manifest import MANIFEST, STATE, Manifest, rank_file
from upshift.checkpoint.opened import Opened
from upshift.checkpoint.ranks import Broadcast, Gather, Ranks
from upshift.checkpoint.reading import Reader
from upshift.checkpoint.retention import Checkpoint, to_delete
from upshift.checkpoint.shards import Shape, Shard
from upshift.checkpoint.states import state_file
from upshift.checkpoint.told import told
from upshift.checkpoint.tree import Tensors, split
from upshift.errors import CheckpointError, InUseError

FOLDER = "checkpoints"
QUARANTINE = "quarantine"

_LEFTOVERS = (".tmp-", ".trash-")
#: Beside the tensors: header, state, manifest and the filesystem's own books.
_SLACK = 4 * 2**20

Say = Callable[[str], None]

#: Shape of the whole and offset of each shard of this rank, by name.
Places = Mapping[str, tuple[Shape, Shape]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk: synced, read again, and found whole. `seconds` from call to return."""

    path: Path
    step: int
    seconds: float
    bytes: int


class Store:
    """The checkpoints of one run.

    Args:
        folder: the run folder; everything lies in its `checkpoints/`.
        rank, world: of the processes that save together, on one shared folder.
        gather: obj -> every rank's obj on rank 0, None elsewhere; JSON-able objs. Not needed by one process.
        broadcast: obj -> rank 0's obj on every rank. Not needed by one process.
        say: is told what happened to checkpoints (`store.say` may be set later).
        disk: the I/O calls.

    With several ranks, `acquire`, `save`, `newest` and `go_back` are called by all of them alike. `save` may run in
    another thread (`Saver`); the exchanges must then be others than those of the training.
    """

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        world: int = 1,
        gather: Gather | None = None,
        broadcast: Broadcast | None = None,
        *,
        say: Say = lambda text: None,
        disk: Disk | None = None,
    ) -> None:
        self.say = say
        self.folder = Path(folder) / FOLDER
        self.attempt = 0
        self._disk = disk or Disk()
        self._ranks = Ranks(rank, world, gather, broadcast)
        self._lock = Lock(self.folder, self._disk)
        self._reader = Reader(self.folder, self._disk)
        self._used: set[str] = set()
        self._saves = 0
        self._busy = threading.RLock()

    @property
    def world(self) -> int:
        """How many processes save together."""
        return self._ranks.world

    # -- ownership ----------------------------------------------------------------------------------------------

    def acquire(self) -> Store:
        """Own the folder: lock it, take the next attempt number, remove what a killed run left half done.

        Raises:
            InUseError: another process owns it; told at once, nothing was changed.
            CheckpointError: the folder cannot be made, written or locked.
        """

        def take(_: list[Any]) -> int:
            with told(f"{self.folder} cannot be written"):
                io.make_folders(self._disk, self.folder)
                self._lock.take()
                self._sweep()
            return self._lock.attempt

        try:
            self.attempt = self._ranks.decide(take)
        except BaseException:
            self._lock.release()
            raise
        return self

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def __enter__(self) -> Store:
        return self if self.attempt else self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _sweep(self) -> None:
        for name in sorted(os.listdir(self.folder)):
            path = self.folder / name
            if name.startswith(_LEFTOVERS):
                if path.is_dir() and not path.is_symlink():
                    io.remove_tree(self._disk, path)
                else:
                    self._disk.unlink(path)

    def _check_owner(self) -> None:
        if self._ranks.rank == 0:
            self._lock.check()
        elif not self.attempt:
            raise InUseError("this process has not acquired the run folder.", remedy="Call acquire() first.")

    # -- writing ------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree: Any,
        *,
        shards: Mapping[str, Shard] | None = None,
        facts: dict[str, Any] | None = None,
        best: bool = False,
        before_spike: bool = False,
    ) -> Saved:
        """Write this rank's state (see `tree.split`); returns when the checkpoint is durable and was read again.

        Args:
            shards: what this rank holds of tensors that are spread over ranks, under names that are the same on all;
                a `Spread` of that name stands for the whole one in the state of some rank.
            facts: JSON, rank 0's count, in the manifest: step, samples, epoch, metric values and the like.

        Raises:
            CheckpointError: it could not be written (disk full, I/O error, no owner) or did not read back; earlier
                checkpoints are untouched and nothing is left behind.
        """

        def parts() -> tuple[Any, Tensors]:
            return apart(tree, shards or {})

        return self._save(step, parts, places(shards or {}), facts or {}, best, before_spike)

    def save_parts(
        self,
        step: int,
        skeleton: Any,
        tensors: Tensors,
        *,
        shards: Places | None = None,
        facts: dict[str, Any] | None = None,
        best: bool = False,
        before_spike: bool = False,
    ) -> Saved:
        """As `save`, of a state that `apart` took apart; an exception as skeleton fails alike on all ranks.

        `shards`: the `places` of those of the tensors that are shards.
        """

        def parts() -> tuple[Any, Tensors]:
            if isinstance(skeleton, Exception):
                raise skeleton
            return skeleton, tensors

        return self._save(step, parts, shards or {}, facts or {}, best, before_spike)

    def _save(
        self,
        step: int,
        parts: Callable[[], tuple[Any, Tensors]],
        shards: Places,
        facts: dict[str, Any],
        best: bool,
        spike: bool,
    ) -> Saved:
        begun = time.perf_counter()
        with self._busy:
            self._saves += 1
            temporary = self.folder / f".tmp-step-{step}-a{self.attempt}-{self._saves}"
            try:
                with told(f"the checkpoint of step {step} was not written"):
                    name = self._ranks.decide(
                        lambda said: self._commit(step, temporary, said, facts, best, spike),
                        lambda: self._write_own(step, temporary, parts, shards),
                    )
                    self._ranks.decide(lambda said: self._accept(name, said), lambda: self._read_again(name))
            except BaseException:
                self._discard(temporary)
                raise
            found = self._reader.checkpoint(name)
            self._reader.known[name] = ""
            self._ranks.decide(lambda said: self._clean())
        return Saved(self.folder / name, step, time.perf_counter() - begun, found.bytes)

    def _write_own(
        self, step: int, temporary: Path, parts: Callable[[], tuple[Any, Tensors]], shards: Places
    ) -> dict[str, Any]:
        """This rank's tensors, synced; what rank 0 must know of them."""
        if not isinstance(step, int) or not 0 <= step <= manifests.MAX_STEP:
            raise CheckpointError(f"{step!r:.40} is no step.", remedy="Steps count from 0.")
        self._check_owner()
        skeleton, tensors = parts()
        needed, free = files.total(tensors) + _SLACK, self._disk.free(self.folder)
        if needed > free:
            raise OSError(errno.ENOSPC, f"it takes {needed:,} bytes, {free:,} are free")
        try:
            self._disk.make_folder(temporary)
        except FileExistsError:
            pass  # another rank was first
        name = rank_file(self._ranks.rank, self._ranks.world)
        writer = io.Writer(self._disk, temporary / name)
        try:
            files.write(writer, tensors, shards)
            file = writer.finish()
        finally:
            writer.close()
        return {
            "size": file.size,
            "sha256": file.sha256,
            "state": {"tree": skeleton, "dtypes": files.rare_dtypes(tensors)},
        }

    def _commit(
        self, step: int, temporary: Path, said: list[Any], facts: dict[str, Any], best: bool, spike: bool
    ) -> str:
        """State and manifest, then the rename that makes it a checkpoint; its name. Rank 0 only."""
        entries = {rank_file(i, len(said)): manifests.File(item["size"], item["sha256"]) for i, item in enumerate(said)}
        entries[STATE] = io.write_file(self._disk, temporary / STATE, state_file([item["state"] for item in said]))
        manifest = Manifest(
            step=step,
            attempt=self.attempt,
            world=len(said),
            files=entries,
            best=best,
            before_spike=spike,
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
            versions=_versions(),
            facts=manifests.plain(facts),
        )
        io.write_file(self._disk, temporary / MANIFEST, manifests.render(manifest))
        self._disk.sync_folder(temporary)
        self._lock.check()
        name = self._new_name(step)
        self._disk.rename(temporary, self.folder / name)
        self._disk.sync_folder(self.folder)
        return name

    def _new_name(self, step: int) -> str:
        serial = 1
        while True:
            name = manifests.folder_name(step, self.attempt, serial)
            places = (self.folder / name, self.folder / QUARANTINE / name, self.folder / f".trash-{name}")
            if name not in self._used and not any(os.path.lexists(place) for place in places):
                self._used.add(name)
                return name
            serial += 1

    def _read_again(self, name: str) -> str:
        """What is wrong with the files this rank wrote, read from the disk; empty when they are as written."""
        if problem := self._reader.checkpoint(name).problem:
            return problem
        manifest = self._reader.manifest(name)
        mine = [rank_file(self._ranks.rank, self._ranks.world), *([STATE] if self._ranks.rank == 0 else [])]
        return next((text for file in mine if (text := self._reader.file_problem(name, file, manifest))), "")

    def _accept(self, name: str, problems: list[str]) -> None:
        if problem := next(filter(None, problems), ""):
            self._to_quarantine(name, problem)
            raise CheckpointError(f"it did not read back: {problem}.", remedy="Check the disk.")

    def _discard(self, temporary: Path) -> None:
        """Remove an unfinished save; what cannot be removed now is removed by the next owner."""
        if self._ranks.rank == 0 and temporary.is_dir():
            try:
                io.remove_tree(self._disk, temporary)
            except OSError:
                pass

    # -- retention ----------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Delete what need not stay. A failure is told: the checkpoint just written stands."""
        try:
            for item in to_delete(self.checkpoints(), self._whole):
                self._lock.check()
                trash = self.folder / f".trash-{item.path.name}"
                self._disk.rename(item.path, trash)
                self._disk.sync_folder(self.folder)
                io.remove_tree(self._disk, trash)
        except OSError as error:
            self.say(f"old checkpoints could not be removed: {error.strerror or error}")

    def _whole(self, item: Checkpoint) -> bool:
        """Whether it verifies; read once a process, and quarantined where it does not."""
        name = item.path.name
        if name not in self._reader.known:
            self._reader.known[name] = self._reader.problem(name)
        if problem := self._reader.known[name]:
            self._set_aside(name, problem)
        return not problem

    def _set_aside(self, name: str, problem: str) -> None:
        """A damaged checkpoint: moved away by the owner, named by everybody."""
        if self._lock.held:
            self._to_quarantine(name, problem)
        else:
            self.say(f"{name} is damaged: {problem}")

    def _to_quarantine(self, name: str, problem: str) -> None:
        folder, n = self.folder / QUARANTINE, 1
        try:
            if not folder.is_dir():
                self._disk.make_folder(folder)
                self._disk.sync_folder(self.folder)
            while os.path.lexists(target := folder / (name if n == 1 else f"{name}.{n}")):
                n += 1
            self._disk.rename(self.folder / name, target)
            self._disk.sync_folder(folder)
            self._disk.sync_folder(self.folder)
        except OSError as error:
            self.say(f"{name} is not used ({problem}), and could not be moved away: {error.strerror or error}")
            return
        self._used.add(name)
        self._reader.known.pop(name, None)
        self.say(f"{name} moved to {QUARANTINE}: {problem}")

    # -- reading ------------------------------------------------------------------------------------------------

    def checkpoints(self, *, verify: bool = False) -> list[Checkpoint]:
        """All checkpoints, oldest first; with `verify` every file is read. Changes nothing, needs no owner.

        One whose manifest cannot be read is listed with `problem` and the step of its name.
        """
        found = [self._reader.checkpoint(name) for name in self._reader.names()]
        if verify:
            problems = {item.path: item.problem or self._reader.problem(item.path.name) for item in found}
            found = [replace(i, verified=not problems[i.path], problem=problems[i.path]) for i in found]
        return sorted(found, key=lambda item: item.order)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint of which every byte is as written; None where there is none.

        Damaged ones on the way are quarantined if this process owns the folder, and told through `say` in any case.
        """

        def choose(_: list[Any]) -> str:
            for item in reversed(self.checkpoints()):
                name = item.path.name
                problem = item.problem or self._reader.problem(name)
                self._reader.known[name] = problem
                if not problem:
                    return name
                if os.path.lexists(item.path):  # else its owner has just removed it
                    self._set_aside(name, problem)
            return ""

        with self._busy, told(f"{self.folder} cannot be read"):
            name = self._ranks.decide(choose)
        return replace(self._reader.checkpoint(name), verified=True) if name else None

    def load(self, checkpoint: Checkpoint, rank: int | None = None) -> tuple[Any, dict[str, Any]]:
        """A rank's state (this one's; that of rank 0 where fewer ranks wrote) and the facts. Tensors on the host.

        Tensors that are spread over ranks are put together: what comes is whole, whoever wrote it.
        Size and SHA-256 of what is read are checked before anything is parsed.

        Raises:
            CheckpointError: damaged, gone, or not a state.
        """
        wanted = self._ranks.rank if rank is None else rank
        with self.opened(checkpoint) as found:
            return found.tree(wanted if wanted < found.manifest.world else 0), found.facts

    @contextmanager
    def opened(self, checkpoint: Checkpoint) -> Iterator[Opened]:
        """A checkpoint to be read piece by piece, this rank's shards first. Inside the block errors are as for `load`.

        Raises:
            CheckpointError: damaged, gone, or not a state.
        """
        name = checkpoint.path.name
        with told(f"{name} cannot be read"), self._reader.open(name, self._ranks.rank) as found:
            yield found

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: later checkpoints no longer count; they are moved to the quarantine.

        For a rewind after a spike, and for a resume from a chosen checkpoint.
        """

        def away(_: list[Any]) -> None:
            self._lock.check()
            for item in self.checkpoints():
                if item.step > step:
                    self._to_quarantine(item.path.name, f"the run went back to step {step}")

        with self._busy:
            self._ranks.decide(away)

    def keep_before_spike(self, checkpoint: Checkpoint) -> None:
        """Mark the state that training went back to, so that retention keeps the last of its kind; all ranks call it.

        The manifest is replaced by one with the mark, whole and at once. A failure is told, and changes nothing.
        """
        name = checkpoint.path.name
        temporary = self.folder / f".tmp-mark-{name}"

        def mark(_: list[Any]) -> None:
            self._lock.check()
            manifest = self._reader.manifest(name)
            if manifest.before_spike:
                return
            try:
                io.write_file(self._disk, temporary, manifests.render(replace_fields(manifest, before_spike=True)))
                self._disk.rename(temporary, self.folder / name / MANIFEST)
            except OSError:
                if os.path.lexists(temporary):
                    self._disk.unlink(temporary)
                raise
            self._disk.sync_folder(self.folder / name)

        try:
            with self._busy, told(f"{name} was not marked as the one before a spike"):
                self._ranks.decide(mark)
        except CheckpointError as error:
            self.say(error.message)


def apart(tree: Any, shards: Mapping[str, Shard]) -> tuple[Any, Tensors]:
    """The skeleton of a state, and its tensors with those of the shards; nothing is copied.

    Raises:
        CheckpointError: see `tree.split`. An exception in place of the state is raised.
    """
    if isinstance(tree, Exception):
        raise tree
    skeleton, tensors = split(tree, shards)
    return skeleton, tensors | {name: shard.tensor.detach() for name, shard in shards.items()}


def places(shards: Mapping[str, Shard]) -> dict[str, tuple[Shape, Shape]]:
    """Where the shards lie in their tensors."""
    return {name: (shard.shape, shard.offset) for name, shard in shards.items()}


def _versions() -> dict[str, str]:
    upshift, torch = sys.modules["upshift"], sys.modules.get("torch")
    found = {"upshift": str(upshift.__version__), "python": ".".join(map(str, sys.version_info[:3]))}
    return {**found, "torch": str(torch.__version__)} if torch else found
