"""Saves beside the training: the training waits for a copy of the tensors only, the disk is a thread's business.

Mohan et al., "CheckFreq" (FAST 2021): snapshot, then persist. A failed save is told and remembered, and never ends the
training; the checkpoints before it stand.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from upshift.checkpoint.shards import Shard
from upshift.checkpoint.store import Saved, Store, apart, places
from upshift.checkpoint.tree import Tensors
from upshift.errors import CheckpointError, UpshiftError

if TYPE_CHECKING:
    import torch


class Saver:
    """Saves into a store, one at a time, in a thread.

    Args:
        store: acquired. With several ranks its gather and broadcast must not be those of the training: they are called
            from the thread, while the training exchanges gradients.

    `last` is the newest checkpoint that is durable, `error` what the last save failed with (None after a success),
    `failures` how many failed so far, `stall_seconds` what the training waited for in total, `write_seconds` how long
    the last write took.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._copies: Tensors = {}
        self.last: Saved | None = None
        self.error: Exception | None = None
        self.failures = 0
        self.stall_seconds = 0.0
        self.write_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        step: int,
        tree: Any,
        *,
        shards: Mapping[str, Shard] | None = None,
        facts: dict[str, Any] | None = None,
        best: bool = False,
        before_spike: bool = False,
        wait: bool = False,
    ) -> float:
        """Copy the tensors of `tree` to the host and begin to write them; the tensors may change when this returns.

        Arguments are those of `Store.save`. A save that is still being written is waited for first. With `wait` returns
        when all is durable.

        Returns:
            Seconds the caller was kept.

        Never raises for what the disk or the state does: see `error`.
        """
        begun = time.perf_counter()
        self.wait()
        try:
            skeleton, tensors = apart(tree, shards or {})
            self._copies = _owned(tensors, self._copies)
        except (UpshiftError, RuntimeError, MemoryError) as error:
            if self._store.world == 1:
                self._failed(step, error)
                return self._kept(begun)
            # The other ranks are on their way: they must hear of it.
            skeleton, self._copies = error, {}
        given = {"shards": places(shards or {}), "facts": facts, "best": best, "before_spike": before_spike}
        # Not a daemon: an interpreter that ends finishes the save that has begun.
        self._thread = threading.Thread(
            target=self._write, args=(step, skeleton, given), name="upshift-checkpoint", daemon=False
        )
        self._thread.start()
        if wait:
            self.wait()
        return self._kept(begun)

    def wait(self, timeout: float | None = None) -> Saved | None:
        """Wait for the save in progress, at most `timeout` seconds; the newest durable checkpoint."""
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None
        return self.last

    def _kept(self, begun: float) -> float:
        seconds = time.perf_counter() - begun
        self.stall_seconds += seconds
        return seconds

    def _write(self, step: int, skeleton: Any, given: dict[str, Any]) -> None:
        begun = time.perf_counter()
        try:
            self.last = self._store.save_parts(step, skeleton, self._copies, **given)
            self.error = None
        except Exception as error:
            self._failed(step, error)
        self.write_seconds = time.perf_counter() - begun

    def _failed(self, step: int, error: Exception) -> None:
        self.error = error
        self.failures += 1
        text = error.message if isinstance(error, CheckpointError) else f"the checkpoint of step {step}: {error}"
        self._store.say(f"not saved, training goes on: {text}")


def _owned(tensors: Tensors, before: Tensors) -> Tensors:
    """Copies on the host, into the memory of the copies before where they fit.

    From a CUDA device into pinned memory, all queued before one wait.
    """
    import torch

    copies: Tensors = {}
    devices: set[torch.device] = set()
    for name, tensor in tensors.items():
        onto = before.get(name)
        pinned = tensor.device.type == "cuda"
        if onto is None or onto.shape != tensor.shape or onto.dtype != tensor.dtype or onto.stride() != _stride(tensor):
            onto = torch.empty_strided(tensor.shape, _stride(tensor), dtype=tensor.dtype, pin_memory=pinned)
        copies[name] = onto.copy_(tensor, non_blocking=pinned)
        if pinned:
            devices.add(tensor.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a copy: the tensor's own where its elements fill a block, else those of a contiguous one."""
    import torch

    if tensor.is_contiguous():
        return tensor.stride()
    return tuple(torch.empty_like(tensor, device="meta").stride())
