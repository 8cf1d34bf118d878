"""The trial server: between two steps a hooked process waits for the parent to say what to run next.

    {"kind": "go", "steps": n}                  run n steps, answer with their seconds and losses
    {"kind": "plan", "name": t, "settings": {}} put technique t in effect (settings null: take it off for good)
    {"kind": "compare", "a": [...], "b": [...], "seconds": s, ...}   alternate two sets of live techniques
    {"kind": "digest"}                          hash of all parameters
    {"kind": "state", "save" or "load": path}   write the state of the training, or take one over
    {"kind": "late", "path": npz}               keep the gradients and updates of the next step, without dropout
    {"kind": "finish"}                          answer with what had no effect; the parent ends the process

The process is never unwound: after `finish` it waits to be killed, so no `finally` or bare `except` of the script
can write over anything.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import msgspec

from upshift.hook.alternation import Alternation
from upshift.hook.channel import Channel, ChannelClosed
from upshift.hook.controller import Controller, describe, exit_code, stand_still
from upshift.hook.drain import drain
from upshift.hook.dropout import dropout_off
from upshift.hook.latestep import LateStep, load, save
from upshift.hook.snapshots import Snapshots
from upshift.measure.steps import StepRecord, evaluates_apart, loss_values, training_seconds
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
        self.compare: Alternation | None = None
        self.notes: list[tuple[str, str, str]] = []
        self.snapshots: Snapshots | None = None
        self.dropout_on: Callable[[], None] = lambda: None
        self.late: LateStep | None = None

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
        if self._block_ends(record):
            # Later the device is read from, or idle: what is queued now is part of these steps.
            record = record._replace(total=record.total + drain(self.torch, self.watch))
        if self.late is not None:
            self.late.finish()
            self.late = None
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

    def _block_ends(self, record: StepRecord) -> bool:
        """Whether the device must have caught up after this step."""
        if self.snapshots is not None and record.number + 1 in UPDATE_STEPS:
            return True
        return self.left <= 1 if self.compare is None else self.compare.block_ends()

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
                drain(self.torch, self.watch)
                self.left = max(int(message["steps"]), 1)
                return
            elif kind == "plan":
                self._set(message["name"], message.get("settings"))
                self._tell({"kind": "done", "acted": list(self.stage.acted)})
            elif kind == "compare":
                drain(self.torch, self.watch)
                self.compare = Alternation(
                    tuple(message["a"]), tuple(message["b"]), float(message["seconds"]),
                    block=int(message.get("block", 1)), seed=int(message.get("seed", 0)),
                )  # fmt: skip
                self._arm(self.compare.next_arm())
                return
            elif kind == "digest":
                self._tell({"kind": "digest", "sha256": self.digest()})
            elif kind == "state":
                self._tell({"kind": "state", "problem": self._state(message)})
            elif kind == "late":
                self.late = LateStep(self.watch, message["path"], lambda masks: dropout_off(self.torch, masks))
                self._tell({"kind": "done"})

    def _state(self, message: dict[str, Any]) -> str:
        """Write the state of the training, or take one over. Returns why not."""
        try:
            if "save" in message:
                return save(self.torch, self.watch, message["save"])
            return load(self.torch, self.watch, message["load"])
        except Exception as error:
            return describe(error)

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
            **self._memory(),
        }

    def _memory(self) -> dict[str, int]:
        """The most bytes held so far: of this process in host memory, and on the accelerator where it uses one."""
        unit = 1 if sys.platform == "darwin" else 1024
        found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        if self.torch is not None and self.torch.cuda.is_initialized():
            found["device_memory"] = self.torch.cuda.max_memory_reserved()
        return found

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
        apart = evaluates_apart(self.records[-512:])
        if not compare.add(training_seconds(record, apart)):
            self._arm(compare.next_arm())
            return True
        self.compare = None
        self._arm(compare.reference)
        decision, pairing = compare.result()
        found = None if pairing is None else msgspec.to_builtins(pairing)
        self._tell({"kind": "compared", "decision": decision, "pairing": found})
        return False
