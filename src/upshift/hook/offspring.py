"""Trainings in the children of a hooked process.

    spawned   by multiprocessing ("spawn", "forkserver"): told by the first thing it unpickles; the plan holds there too
    forked    a copy: its patches come out, and recording begins with its first backward pass. It trains without the
              plan: what techniques changed before the fork belongs to the parent and may lie in shared memory

A loader worker is neither told nor ever makes a backward pass: it stays untouched.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from upshift.hook.assemble import assemble, torch_is_here
from upshift.hook.followed import FollowedController
from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.hook.watch import Watch
from upshift.sites.runner import ChildSpec

#: Folder of what runs in a process before anything of upshift is imported there.
BELOW = Path(__file__).parent / "start" / "below"


class _Told(msgspec.Struct):
    spec: ChildSpec
    outside: dict[str, str]


def torch_imported(told: str, torch: ModuleType) -> None:
    """This process was started by a script's multiprocessing and has imported torch.

    Args:
        told: a `_Told` as JSON.
    """
    found = msgspec.json.decode(told, type=_Told)
    follow(found.spec, found.outside, torch)


def follow(spec: ChildSpec, outside: dict[str, str], torch: ModuleType) -> None:
    """Record this process, and its children, from its first training step on.

    Args:
        outside: what came of techniques that only change the environment (name -> why no effect).
    """
    controller = FollowedController(spec)
    watch = assemble(spec, controller, outside)
    torch_is_here(torch, controller)
    Offspring(spec, watch).follow(torch)


class Offspring:
    """Follows the children that a hooked process makes: copies by fork, and fresh ones by multiprocessing."""

    def __init__(self, spec: ChildSpec, watch: Watch) -> None:
        """
        Args:
            watch: the watch of this process; forked children take its patches out.
        """
        self.spec = spec
        self.watch = watch
        self.torch: Any = None
        self._spawning = Patches()
        self._waiting = Patches()

    def follow(self, torch: ModuleType) -> None:
        """Follow every child from now on."""
        from multiprocessing import spawn

        self.spawned(spawn)
        self.forked(torch)

    def forked(self, torch: ModuleType) -> None:
        """Follow forked children."""
        self.torch = torch
        os.register_at_fork(after_in_child=self._wait_for_training)

    def spawned(self, spawn: Any) -> None:
        """Follow children that multiprocessing starts afresh. `spawn` is `multiprocessing.spawn`."""
        if self._spawning.names():
            return
        original = spawn.get_preparation_data
        told = msgspec.json.encode(_Told(self.spec, self.watch.stage.outside)).decode()

        def get_preparation_data(name: str) -> Any:
            data = original(name)
            starting = sys._getframe(1).f_locals.get("process_obj")
            if not _is_loader_worker(starting):
                data["upshift"] = _Note(told)
            return data

        self._spawning.set(spawn, "get_preparation_data", like(original, get_preparation_data))

    def _wait_for_training(self) -> None:
        """In a forked child: nothing but the first backward pass is waited for, which a loader worker never makes."""
        self.watch.close()
        self._waiting.close()
        original = self.torch.autograd.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            self._waiting.close()
            self.born(self.torch)
            self.torch.autograd.backward(*args, **kwargs)

        self._waiting.set(self.torch.autograd, "backward", like(original, backward))

    def born(self, torch: ModuleType) -> None:
        """This process is a forked child that trains, or has imported torch itself."""
        self._spawning.close()
        notes = ("forked by the script: recorded, without the plan",) if self.spec.plan else ()
        spec = msgspec.structs.replace(self.spec, plan={}, options={**self.spec.options, "notes": notes})
        follow(spec, {}, torch)


class _Note:
    """Waits for torch in the process that unpickles it, where nothing of upshift has been imported."""

    def __init__(self, told: str) -> None:
        self.told = told

    def __reduce__(self) -> Any:
        return exec, (_WAIT.format(folder=str(BELOW), told=self.told),)


_WAIT = """
try:
    import sys
    sys.path.insert(0, {folder!r})
    try:
        import upshift_below
    finally:
        sys.path.remove({folder!r})
    upshift_below.wait("offspring", {told!r})
except Exception:
    pass  # the script's own process goes on, unseen
"""


def _is_loader_worker(process: Any) -> bool:
    """Whether a process about to start is one of a DataLoader."""
    target = getattr(process, "_target", None)
    return str(getattr(target, "__module__", "")).startswith("torch.utils.data.")
