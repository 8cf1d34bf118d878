"""How often to save: the interval at which the time lost to saving and the time lost to interruptions are least.

Young, "A first order approximation to the optimum checkpoint interval" (CACM 17, 1974); Daly, "A higher order estimate
of the optimum checkpoint interval for restart dumps" (FGCS 22, 2006), equation 37.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

#: Seconds between interruptions where nothing is known. Assumed, not measured: a spot machine that lasts some hours.
INTERRUPTED_EVERY = 4 * 3600.0

#: Saving takes at most this share of the time, however often a machine is lost.
MOST_OVERHEAD = 0.035


def young(cost: float, between: float) -> float:
    """sqrt(2 C M): seconds of training between saves.

    Args:
        cost: seconds the training waits for one save, > 0.
        between: expected seconds between interruptions, > 0.
    """
    return math.sqrt(2.0 * cost * between)


def daly(cost: float, between: float) -> float:
    """sqrt(2 C M) (1 + sqrt(C/2M)/3 + (C/2M)/9) - C for C < 2M, else M: seconds of training between saves.

    Args, as for `young`. Closer than Young's where a save is long against the time between interruptions.
    """
    if cost >= 2.0 * between:
        return between
    share = cost / (2.0 * between)
    return young(cost, between) * (1.0 + math.sqrt(share) / 3.0 + share / 9.0) - cost


def seconds_between(stall: float, write: float = 0.0, between: float = INTERRUPTED_EVERY) -> float:
    """Seconds from one save to the next.

    Daly's interval; not shorter than a save takes to reach the disk (they would queue), nor than keeps saving below
    `MOST_OVERHEAD` of the time.

    Args:
        stall: measured seconds the training waits for one save.
        write: measured seconds until it is durable, beside the training.
        between: expected seconds between interruptions.

    Raises:
        ValueError: a negative time, or no time between interruptions.
    """
    if not (stall >= 0.0 and write >= 0.0 and between > 0.0):
        raise ValueError(f"stall {stall}, write {write}, between {between}: seconds")
    best = daly(stall, between) if stall > 0.0 else 0.0
    return max(best, stall / MOST_OVERHEAD, write)


class Pace:
    """When the next save is due, from what saves were seen to cost. Time is monotonic; a wall clock has no say.

    Args:
        between: expected seconds between interruptions.
        first: seconds until the first save, whose cost is not known yet.
        clock: monotonic seconds.
    """

    def __init__(
        self, between: float = INTERRUPTED_EVERY, first: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._between = between
        self._clock = clock
        self._since = clock()
        self.seconds = first

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._clock() - self._since >= self.seconds

    def saved(self, stall: float, write: float = 0.0) -> None:
        """A save was begun just now and cost so much; the interval follows."""
        self._since = self._clock()
        self.seconds = seconds_between(stall, write, self._between)
