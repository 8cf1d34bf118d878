"""The trial server: between two steps a hooked process waits for the parent to say what to run next.

    {"kind": "go", "steps": n}                  run n steps, answer with their seconds and losses
    {"kind": "plan", "name": t, "settings": {}} put technique t in effect (settings null: take it off for good)
    {"kind": "compare", "a": [...], "b": [...], "seconds": s, ...}   alternate two sets of live techniques
    {"kind": "digest"}                          hash of all parameters
    {"kind": "finish"}                          answer with what had no effect; the parent ends the process

The process is never unwound: after `finish` it waits to be killed, so no `finally` or bare `except` of the script
can write over anything.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import msgspec

from upshift.hook.channel import Channel, ChannelClosed
from upshift.hook.controller import Controller, describe, exit_code, stand_still
from upshift.hook.patch import Patches
from upshift.hook.snapshots import Snapshots
from upshift.measure.paired import Sequential
from upshift.measure.steps import StepRecord, evaluates_apart, loss_values, median_of, training_seconds
from upshift.sites.runner import ChildSpec

#: Steps whose parameter updates are compared, and up to which dropout is off so that they can be.
UPDATE_STEPS = (1, 2, 3, 10, 11)
DROPOUT_OFF = 11


class TrialController(Controller):
    """Serves the parent's requests at step boundaries."""

    def __init__(self, spec: ChildSpec, channel: Channel) -> None:
        self.spec = spec
        self.channel = channel
        self.torch: Any = None
        self.records: list[StepRecord] = []
        self.left = 0
        self.pending: list[StepRecord] = []
        self.compare: _Compare | None = None
        self.notes: list[tuple[str, str, str]] = []
        self.snapshots: Snapshots | None = None
        self.dropout_on: Callable[[], None] = lambda: None

    def torch_ready(self, torch: ModuleType) -> None:
        """Prepare snapshots of the updates, and switch dropout off for them."""
        self.torch = torch
        if self.spec.options.get("updates"):
            self.snapshots = Snapshots(self.watch, self.spec.record, UPDATE_STEPS)
            self.snapshots.install()
            self.dropout_on = dropout_off(self.torch)

    def say(self, kind: str, name: str, text: str) -> None:
        """Tell the parent at once: a technique that fails must not be measured."""
        self._tell({"kind": "note", "what": kind, "technique": name, "text": text})

    def rescue(self, module: Any, names: tuple[str, ...], error: Exception) -> None:
        """In a trial a technique that raises has failed; the parent ends this process."""
        self._tell({"kind": "failed", "techniques": list(names), "text": describe(error)})
        self._wait_for_the_end()

    def on_step(self, record: StepRecord) -> None:
        """Count down a block; at its end report and wait."""
        if self.snapshots is not None:
            self.snapshots.after_step(record.number + 1)
            if record.number + 1 == DROPOUT_OFF:
                self.dropout_on()
        self.records.append(record)
        if len(self.records) > 4096:
            del self.records[:2048]
        if self.compare is not None:
            if self._compare_step(record):
                return
        elif record.number == 0 and not self.left:
            self._tell({"kind": "ready", "step": self._report([record]), "startup": record.at})
        elif self.left > 1:
            self.left -= 1
            self.pending.append(record)
            return
        else:
            self.left = 0
            self.pending.append(record)
            self._tell({"kind": "steps", **self._report(self.pending)})
            self.pending = []
        self._serve()

    def finish(self, error: BaseException | None) -> None:
        """The script ended before the trial did."""
        try:
            if self.pending:
                self.channel.send({"kind": "steps", **self._report(self.pending)})
            self.channel.send(
                {"kind": "ended", "how": describe(error), "code": exit_code(error), "steps": self.watch.index}
            )
        except ChannelClosed:
            pass

    # -- serving ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            try:
                message = self.channel.receive()
            except ChannelClosed:
                os._exit(0)  # nobody is there to end this process
            kind = (message or {}).get("kind")
            if message is None or kind == "finish":
                self._tell({"kind": "finished", "effects": self.stage.effects(), "steps": self.watch.index})
                self._wait_for_the_end()
            elif kind == "go":
                self._synchronize()
                self.left = max(int(message["steps"]), 1)
                return
            elif kind == "plan":
                self._set(message["name"], message.get("settings"))
                self._tell({"kind": "done", "acted": list(self.stage.acted)})
            elif kind == "compare":
                self._synchronize()
                self.compare = _Compare(message)
                self._arm(self.compare.next_arm())
                return
            elif kind == "digest":
                self._tell({"kind": "digest", "sha256": self.digest()})

    def _set(self, name: str, settings: dict[str, Any] | None) -> None:
        from upshift.techniques import registry

        if settings is None:
            self.stage.remove(name, "switched off", quietly=True)
        else:
            ((technique, filled),) = registry.in_order({name: settings})
            self.stage.add(technique, filled, self.watch.past_moments())
        self.watch.refresh()

    def _wait_for_the_end(self) -> NoReturn:
        """Nothing of the script runs any more; the parent kills the process group."""
        stand_still()

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self.channel.send(message)
        except ChannelClosed:
            os._exit(0)  # nobody is there to end this process

    def _report(self, records: list[StepRecord]) -> dict[str, Any]:
        self._synchronize()
        apart = evaluates_apart(self.records[-512:])
        return {
            "seconds": [training_seconds(item, apart) for item in records],
            "data": [item.data for item in records],
            "optimizer": [item.optimizer for item in records],
            "epochs": [item.epochs for item in records],
            "losses": [list(loss_values(item)) for item in records],
            "backwards": [len(item.losses) for item in records],
            "first": records[0].number,
            "optimizers": len(self.watch.optimizers),
            "problems": self.stage.problems(),
            "effects": self.stage.effects(),
        }

    def _synchronize(self) -> None:
        if self.torch is not None and self.torch.cuda.is_available() and self.torch.cuda.is_initialized():
            self.torch.cuda.synchronize()

    def digest(self) -> str:
        """SHA-256 over every optimized parameter, in logical order."""
        found = hashlib.sha256()
        for reference in self.watch.optimizers:
            optimizer = reference()
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    value = parameter.detach().contiguous().view(-1).view(self.torch.uint8)
                    found.update(value.cpu().numpy().tobytes())
        return found.hexdigest()

    # -- alternating inside this process ------------------------------------------------------------------------

    def _arm(self, names: tuple[str, ...]) -> None:
        if self.stage.switch(names):
            self.watch.refresh()

    def _compare_step(self, record: StepRecord) -> bool:
        """Whether to go on without the parent."""
        compare = self.compare
        assert compare is not None
        self._synchronize() if compare.block_ends() else None
        apart = evaluates_apart(self.records[-512:])
        if not compare.add(training_seconds(record, apart)):
            self._arm(compare.next_arm())
            return True
        self.compare = None
        self._arm(compare.reference)
        self._tell({"kind": "compared", **compare.result()})
        return False


class _Compare:
    """ABBA blocks of two sets of live techniques, until decided or out of time."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.reference = tuple(message["a"])
        self.candidate = tuple(message["b"])
        self.began = time.perf_counter()
        self.seconds = float(message["seconds"])
        self.deadline = self.began + self.seconds
        self.steps = max(int(message.get("block", 1)), 1)
        self.settle = int(message.get("settle", 1))
        self.random = random.Random(int(message.get("seed", 0)))
        self.sequential = Sequential(self.seconds)
        self.order: list[int] = []
        self.block: list[float] = []
        self.quad: list[tuple[int, float]] = []
        self.quads: list[float] = []
        self.times: tuple[list[float], list[float]] = ([], [])
        # Both arms are warmed up first: primitives are built and caches filled on the first steps of an arm.
        self.warm = [0] * self.settle + [1] * self.settle
        self.current = 0
        self.skip = False

    def next_arm(self) -> tuple[str, ...]:
        """The techniques of the step to come."""
        if self.warm:
            self.current = self.warm.pop(0)
            self.skip = True
        elif not self.block:
            self.skip = False
            if not self.order:
                self.order = [0, 1, 1, 0] if self.random.random() < 0.5 else [1, 0, 0, 1]
            self.current = self.order.pop(0)
        return self.candidate if self.current else self.reference

    def block_ends(self) -> bool:
        """Whether the step under way is the last of its block."""
        return len(self.block) + 1 >= self.steps

    def add(self, seconds: float) -> bool:
        """Take in a step. Returns whether the comparison has ended."""
        if self.skip:
            return time.perf_counter() > self.deadline + 30
        self.block.append(seconds)
        if len(self.block) < self.steps:
            return False
        mean = math.fsum(self.block) / len(self.block)
        self.times[self.current].append(mean)
        self.quad.append((self.current, mean))
        self.block = []
        if len(self.quad) == 4:
            a = math.fsum(value for arm, value in self.quad if arm == 0)
            b = math.fsum(value for arm, value in self.quad if arm == 1)
            if a > 0 and b > 0:
                self.quads.append(math.log(a / b))
                self.sequential.add(self.quads[-1], time.perf_counter() - self.began)
            self.quad = []
            if self.sequential.decision != "go on":
                return True
        # Between quads only, so that the evidence stays balanced.
        return not self.quad and time.perf_counter() > self.deadline

    def result(self) -> dict[str, Any]:
        """What the parent is told."""
        decision = self.sequential.finish()
        found = self.sequential.pairing((median_of(self.times[0]), median_of(self.times[1])))
        return {
            "decision": decision,
            "pairing": None if found is None else msgspec.to_builtins(found),
            "quads": len(self.quads),
            "seconds": time.perf_counter() - self.began,
        }


def dropout_off(torch: Any) -> Callable[[], None]:
    """Make dropout the identity, so that the updates of two arms can be compared (masks depend on the layout).

    Returns what switches it on again.
    """
    patches = Patches()
    functional = torch.nn.functional
    state = {"off": True}

    def switched(original: Any) -> Any:
        # A script may keep the function under a name of its own: it must be itself again later.
        def maybe(input: Any, *args: Any, **kwargs: Any) -> Any:
            return input if state["off"] else original(input, *args, **kwargs)

        return maybe

    for name in (
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
    ):
        if hasattr(functional, name):
            patches.set(functional, name, switched(getattr(functional, name)))
    attention = functional.scaled_dot_product_attention

    def without_dropout(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        p = 0.0 if state["off"] else dropout_p
        return attention(query, key, value, attn_mask, p, *args, **kwargs)

    patches.set(functional, "scaled_dot_product_attention", without_dropout)

    def on_again() -> None:
        state["off"] = False
        patches.close()

    return on_again
