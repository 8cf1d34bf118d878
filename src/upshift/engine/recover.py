"""What to do about a loss that is not finite, or that explodes: back to the last good state, and past the batches.

Going back and leaving the batches out is what the training logs of large models describe (Chowdhery et al. 2022, PaLM,
section 5.1: restart from a checkpoint before the spike and skip the data batches seen during it).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

#: Times in a row that a training goes back before it gives up.
MOST_TRIES = 3

#: Losses that are remembered, and how many are needed before a spike can be told.
REMEMBERED, LEAST = 128, 48

#: A spike is so many times the range of the remembered losses above their largest.
SPIKE = 10.0


class Spikes:
    """Tells a loss that explodes from one that is merely noisy: far above everything among the last losses."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self.ceiling = math.inf
        self._count = 0

    def add(self, loss: float) -> bool:
        """Whether this loss is a spike; one that is, is not remembered."""
        if loss > self.ceiling:
            return True
        self._losses.append(loss)
        self._count += 1
        if self._count >= LEAST and self._count % 16 == 0:
            highest, lowest = max(self._losses), min(self._losses)
            self.ceiling = highest + SPIKE * max(highest - lowest, 1e-3 * abs(highest))
        return False

    def forget(self) -> None:
        """After going back: other losses will come."""
        self._losses.clear()
        self.ceiling, self._count = math.inf, 0


@dataclass
class Recovery:
    """How often a training went back, and which batches it leaves out since then."""

    tries: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, first sample) of global batches that are not trained."""
    since: int = -1
    """The step at which it last went back."""

    def give_up(self) -> bool:
        """Whether enough is enough."""
        return self.tries >= MOST_TRIES

    def went_back(self, step: int, epoch: int, cursor: int) -> None:
        """The update `step` was not made; its batch begins at sample `cursor` of `epoch`."""
        self.tries += 1
        self.since = step
        if (epoch, cursor) not in self.left_out:
            self.left_out.append((epoch, cursor))

    def passed(self, step: int) -> None:
        """An update well past the last trouble: the tries are counted anew."""
        if self.tries and step > self.since + REMEMBERED:
            self.tries = 0
