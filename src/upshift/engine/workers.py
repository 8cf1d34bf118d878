"""Worker processes of a DataLoader that live and die with the process that trains, and at nobody else's wish.

A request to stop (SIGTERM, Ctrl-C) usually goes to all processes of a group at once. Workers that end before the
training process has made its last update and its checkpoint take that work with them, so they leave the decision to it:
they ignore Ctrl-C, and SIGTERM unless it is their parent that sends it. When their parent is gone they end within a
second.

A worker that was killed is noticed when its batch is waited for. By default PyTorch raises from a SIGCHLD handler, at
any line of the training loop; these workers are taken off its list.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def _ask_to_stop() -> set[signal.Signals]:
    return {signal.SIGTERM, signal.SIGINT}


@contextmanager
def held_back() -> Iterator[None]:
    """Requests to stop wait until the end; processes started meanwhile begin with them held back."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ask_to_stop())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(above: int, trainer: int) -> None:
    while os.getppid() == above:
        seen = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if seen is not None and seen.si_pid == trainer:
            break
    os._exit(0)


class WorkerInit:
    """Runs first in a worker process, then what the user wants run there (`then(worker_id)`)."""

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigtimedwait"):
            # Held back in every thread of this process, and taken by the one that can tell who sent it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            above, trainer = os.getppid(), multiprocessing.parent_process()
            # Not the same where a fork server stands between them.
            pids = (above, above if trainer is None or trainer.pid is None else trainer.pid)
            threading.Thread(target=_watch, args=pids, name="upshift-parent", daemon=True).start()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker_id)


def started(loader: Any) -> Any:
    """`iter(loader)`, its workers protected as described above."""
    if not loader.num_workers:
        return iter(loader)
    with held_back():
        iterator = iter(loader)
    if getattr(iterator, "_worker_pids_set", False):
        from torch.utils.data._utils.signal_handling import _remove_worker_pids  # type: ignore[attr-defined]

        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    return iterator


def dead(loader: Any, iterator: Any) -> list[str]:
    """Workers that have ended, in words (`worker 4711, killed by SIGKILL`)."""
    found = iterator if iterator is not None else getattr(loader, "_iterator", None)
    ended = [item for item in getattr(found, "_workers", ()) if not item.is_alive()]
    return [f"worker {item.pid}, {_end(item.exitcode)}" for item in ended]


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


def end(loader: Any, iterator: Any) -> None:
    """End the workers of an iterator at once: they only read, and a killed one may hold locks the others wait for."""
    found = iterator if iterator is not None else getattr(loader, "_iterator", None)
    for item in getattr(found, "_workers", ()):
        item.kill()
        item.join(5.0)
    if found is not None and hasattr(found, "_shutdown"):
        thread_done = getattr(found, "_pin_memory_thread_done_event", None)
        if thread_done is not None:
            thread_done.set()
        for queue in getattr(found, "_index_queues", ()):
            queue.cancel_join_thread()
            queue.close()
        # What PyTorch would do when the iterator is dropped: ask workers to end, and wait for them.
        found._shutdown = True
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator = None
