"""Holds the techniques of one process: raises sites, binds what acts, switches and removes it.

Both adapters (the hook for scripts, the engine for jobs) use this one class, so a technique cannot tell them apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from upshift.records.plan import Setting
from upshift.sites.moments import BackwardSeen, LossFunctionSeen, ModelSeen, Moment, OptimizerSeen
from upshift.sites.protocol import (
    Applied,
    BackwardApplied,
    CheckpointApplied,
    ForwardApplied,
    LossApplied,
    NoEffect,
    StepApplied,
    Technique,
)

if TYPE_CHECKING:
    import torch

#: What the adapter is told: kind (`applied`, `no effect`, `failed`, `off`), technique, text.
Say = Callable[[str, str, str], None]


class Stage:
    """The techniques in effect in this process.

    A technique that raises while being applied is taken off and said so; training goes on without it.
    `forward_for` and `steps_for` are what the hot path reads: tuples, rebuilt only when something changes.
    """

    def __init__(self, entries: Iterable[tuple[Technique, dict[str, Setting]]], say: Say) -> None:
        self._entries = {technique.card.name: (technique, settings) for technique, settings in entries}
        self._say = say
        self._applied: dict[str, list[Applied]] = {}
        self._off: set[str] = set()
        self._why: dict[str, str] = {}
        #: Techniques that acted on the environment before this process began -> why they had no effect, if so.
        self.outside: dict[str, str] = {}
        self._forward: dict[int, list[tuple[str, ForwardApplied]]] = {}
        self._step: dict[int, list[tuple[str, StepApplied]]] = {}
        self._loss: dict[str, list[tuple[str, LossApplied]]] = {}
        self._alive: dict[int, Any] = {}
        self._saved: dict[str, list[dict[str, Any]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Techniques asked for and not removed."""
        return tuple(self._entries)

    @property
    def acted(self) -> tuple[str, ...]:
        """Techniques that really act on something now."""
        outside = [name for name, reason in self.outside.items() if name in self._entries and not reason]
        return (*outside, *(name for name, items in self._applied.items() if items and name not in outside))

    def listens(self, site: str) -> bool:
        """Whether a technique acts at this site at all; what nobody asked for need not be patched."""
        return any(site in technique.card.sites for technique, _ in self._entries.values())

    def raise_site(self, moment: Moment) -> None:
        """Offer a moment to every technique whose card names its site."""
        for name, (technique, settings) in list(self._entries.items()):
            if moment.site in technique.card.sites:
                self._offer(name, technique, settings, moment)

    def _offer(self, name: str, technique: Technique, settings: dict[str, Setting], moment: Moment) -> None:
        try:
            outcome = technique.at(moment, settings)
        except Exception as error:
            self.remove(name, f"{type(error).__name__}: {error}")
            return
        if isinstance(outcome, NoEffect):
            # It may still act on another loader, module or optimizer: `effects` says what came of it in the end.
            self._why.setdefault(name, outcome.reason)
        elif outcome is not None:
            self._bind(name, moment, outcome)

    def add(self, technique: Technique, settings: dict[str, Setting], moments: Iterable[Moment]) -> None:
        """Add a technique to a training under way; `moments` are those it would have seen from the start."""
        name = technique.card.name
        self.remove(name, "replaced", quietly=True)
        self._entries[name] = (technique, settings)
        self._off.discard(name)
        self._why.pop(name, None)
        for moment in moments:
            if moment.site in technique.card.sites and name in self._entries:
                self._offer(name, technique, settings, moment)

    def _bind(self, name: str, moment: Moment, applied: Applied) -> None:
        first = name not in self._applied
        self._applied.setdefault(name, []).append(applied)
        if isinstance(moment, (ModelSeen, BackwardSeen)) and isinstance(applied, ForwardApplied):
            self._keep(moment.module, self._forward)
            self._forward.setdefault(id(moment.module), []).append((name, applied))
        if isinstance(moment, OptimizerSeen) and isinstance(applied, StepApplied):
            self._keep(moment.optimizer, self._step)
            self._step.setdefault(id(moment.optimizer), []).append((name, applied))
        if isinstance(moment, LossFunctionSeen) and isinstance(applied, LossApplied):
            self._loss.setdefault(moment.name, []).append((name, applied))
        if name in self._off:
            applied.switch(False)
        self._give_state(name, applied)
        if first and applied.note:
            self._say("applied", name, applied.note)

    def _keep(self, owner: Any, table: dict[int, Any]) -> None:
        """Forget what is bound to `owner` when it dies, since ids are used again."""
        key = id(owner)
        if key not in self._alive:

            def forget(_: Any, key: int = key) -> None:
                self._alive.pop(key, None)
                table.pop(key, None)

            self._alive[key] = weakref.ref(owner, forget)

    def forward_for(self, module: torch.nn.Module) -> tuple[tuple[str, ForwardApplied], ...]:
        """What acts around calls of this root module, outermost first."""
        return tuple(item for item in self._forward.get(id(module), ()) if item[0] not in self._off)

    def steps_for(self, optimizer: torch.optim.Optimizer) -> tuple[tuple[str, StepApplied], ...]:
        """What acts before steps of this optimizer."""
        return tuple(item for item in self._step.get(id(optimizer), ()) if item[0] not in self._off)

    def backward(self) -> BackwardApplied | None:
        """What scales the loss and the gradients of this training; it obeys `switch` between two updates by itself."""
        acting = (item for items in self._applied.values() for item in items)
        return next((item for item in acting if isinstance(item, BackwardApplied)), None)

    def losses_for(self, function: str) -> tuple[tuple[str, LossApplied], ...]:
        """What acts before calls of this loss function in training."""
        return tuple(item for item in self._loss.get(function, ()) if item[0] not in self._off)

    def checkpoints(self) -> tuple[CheckpointApplied, ...]:
        """What acts on the tensors of a checkpoint."""
        acting = ((name, item) for name, items in self._applied.items() for item in items)
        return tuple(item for name, item in acting if name not in self._off and isinstance(item, CheckpointApplied))

    def switch(self, on: Iterable[str]) -> bool:
        """Let exactly the techniques named be in effect (live ones only). Returns whether anything changed."""
        wanted = set(on)
        changed = False
        for name in self._entries:
            off = name not in wanted
            if off == (name in self._off):
                continue
            changed = True
            (self._off.add if off else self._off.discard)(name)
            for applied in self._applied.get(name, ()):
                applied.switch(not off)
        return changed

    def remove(self, name: str, reason: str, *, quietly: bool = False) -> None:
        """Take a technique off for good and restore what it changed."""
        if self._entries.pop(name, None) is None:
            return
        for key, around in list(self._forward.items()):
            self._forward[key] = [item for item in around if item[0] != name]
        for key, before in list(self._step.items()):
            self._step[key] = [item for item in before if item[0] != name]
        for function, acting in list(self._loss.items()):
            self._loss[function] = [item for item in acting if item[0] != name]
        for applied in reversed(self._applied.pop(name, [])):
            try:
                applied.close()
            except Exception as error:
                self._say("failed", name, f"could not be undone: {type(error).__name__}: {error}")
        if not quietly:
            self._say("off", name, reason)

    def effects(self) -> dict[str, str]:
        """Technique -> why it had no effect; the empty string where it acted."""
        result: dict[str, str] = {}
        for name in self._entries:
            items = self._applied.get(name, [])
            reasons = [found.reason for item in items if (found := item.effect()) is not None]
            if not items and name in self.outside:
                result[name] = self.outside[name]
            elif not items:
                result[name] = self._why.get(name, "it found nothing to act on")
            else:
                result[name] = reasons[0] if len(reasons) == len(items) else ""
        return result

    def problems(self) -> dict[str, str]:
        """Technique -> what it found wrong with its own assumptions while acting; such a run proves nothing."""
        found: dict[str, str] = {}
        for name, items in self._applied.items():
            for item in items:
                text = getattr(item, "problem", "")
                if text:
                    found[name] = str(text)
        return found

    def inexact(self) -> dict[str, str]:
        """Technique -> why a run that is stopped and resumed with it does not end in the very same bits."""
        return {
            name: str(text) for name, items in self._applied.items() for item in items
            if (text := getattr(item, "inexact", ""))
        }  # fmt: skip

    def states(self) -> dict[str, list[dict[str, Any]]]:
        """What a resumed run needs of every technique, in the order in which its parts were applied."""
        return {name: [item.state_dict() for item in items] for name, items in self._applied.items()}

    def load_states(self, saved: dict[str, list[dict[str, Any]]]) -> None:
        """Give every technique what `states` returned; parts that are applied later get theirs then."""
        self._saved = {name: list(items) for name, items in saved.items()}
        for name, items in self._applied.items():
            for item in items:
                self._give_state(name, item)

    def _give_state(self, name: str, applied: Applied) -> None:
        waiting = self._saved.get(name)
        load = getattr(applied, "load_state_dict", None)
        if waiting:
            state = waiting.pop(0)
            if load is not None and state:
                load(state)

    def close(self) -> None:
        """Undo everything, last applied first."""
        for name in reversed(list(self._applied)):
            for applied in reversed(self._applied.pop(name)):
                try:
                    applied.close()
                except Exception as error:
                    self._say("failed", name, f"could not be undone: {type(error).__name__}: {error}")
        self._forward.clear()
        self._step.clear()
        self._loss.clear()
