"""What to do about a loss that is not finite, or that explodes: back to the last good state, and past the batches.

Going back and leaving the batches out is what the training logs of large models describe (Chowdhery et al. 2022, PaLM,
section 5.1: restart from a checkpoint before the spike and skip the data batches seen during it).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Times in a row that a training goes back before it gives up.
MOST_TRIES = 3

#: Losses that are remembered, and how many are needed before a spike can be told.
REMEMBERED, LEAST = 128, 48

#: A spike is so many times the range of the remembered losses above their largest, in so many updates in a row: one
#: wild sample makes one large loss, a training that comes apart makes many.
SPIKE, IN_A_ROW = 10.0, 3

Place = tuple[int, int]
"""Epoch and first sample of a global batch."""


class Spikes:
    """Tells a loss that explodes from one that is merely noisy: far above all of the last losses, and it stays."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._ceiling = math.inf
        self._count = 0
        self._above: list[Place] = []
        self.off = False
        """Whether it has been wrong too often to be asked."""

    @property
    def suspicious(self) -> bool:
        """Whether the last update was far above the others; such a state is not saved."""
        return bool(self._above)

    def add(self, loss: float, epoch: int, cursor: int) -> list[Place]:
        """The batches of a spike that has just been told; empty as a rule. `cursor`: the batch's first sample."""
        if loss > self._ceiling:
            self._above.append((epoch, cursor))
            return self._above if len(self._above) >= IN_A_ROW and not self.off else []
        if self._above:
            self._above = []
        self._losses.append(loss)
        self._count += 1
        if self._count >= LEAST and self._count % 16 == 0:
            highest, lowest = max(self._losses), min(self._losses)
            self._ceiling = highest + SPIKE * max(highest - lowest, 1e-3 * abs(highest))
        return []

    def forget(self) -> None:
        """After going back: other losses will come."""
        self._losses.clear()
        self._above = []
        self._ceiling, self._count = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to tell a spike where an uninterrupted one does."""
        return {
            "losses": list(self._losses), "ceiling": self._ceiling, "count": self._count,
            "above": [list(place) for place in self._above], "off": self.off,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; from nothing where the state is empty (a checkpoint of an earlier version)."""
        self.forget()
        self._losses.extend(state.get("losses", ()))
        self._ceiling, self._count = state.get("ceiling", math.inf), state.get("count", 0)
        self._above = [(epoch, cursor) for epoch, cursor in state.get("above", ())]
        self.off = bool(state.get("off", False))


@dataclass
class Recovery:
    """How often a training went back, and which batches it leaves out since then."""

    tries: int = 0
    left_out: list[Place] = field(default_factory=list)
    """(epoch, first sample) of global batches that are not trained."""
    since: int = -1
    """The step at which it last went back."""

    def give_up(self) -> bool:
        """Whether enough is enough."""
        return self.tries >= MOST_TRIES

    def went_back(self, step: int, places: list[Place]) -> None:
        """Going back from `step`; the batches at `places` are left out from here on."""
        self.tries += 1
        self.since = step
        self.left_out += [place for place in places if place not in self.left_out]

    def passed(self, step: int) -> None:
        """An update well past the last trouble: the tries are counted anew."""
        if self.tries and step > self.since + REMEMBERED:
            self.tries = 0
