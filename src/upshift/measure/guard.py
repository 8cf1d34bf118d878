"""The guard of a run: is its loss still what the proof saw, and does it stay down after the steps the proof saw?

Two tests share the false-alarm rate `ALPHA` of a whole run, one half each.

Within the band, each window of the run is held against the window of the band at the same steps. It is outside where
its mean lies above

    mean + sqrt((z * between)^2 + (t * spread)^2 * (1/n of the band + 1/n of the run))

with the quantiles of the error this look may spend: `alpha * share^1.5` of the looks so far (Kim and DeMets 1987), the
increments added up by Bonferroni. Two windows in a row must be outside: one spike is no harm. A loss below the band is
never an alarm: resumed runs begin there.

Beyond it there is nothing to compare with but the run itself. Its windows grow until they hold `LONGEST` steps.
An alarm needs `GROUP` windows in a row above the best stretch so far by more than each of

    the scatter of its own windows, with an error of alpha / (j (j + 1)) at look j, which adds up to alpha
    half of what the loss has fallen, since the beginning of the band where that was higher
    a tenth of the loss

so that a plateau, a restart of the learning rate or a noisy loss is none. A slow harm that only keeps the loss from
falling further is not seen there.

After an alarm somebody takes a technique off, says so by `changed`, and the windows that begin after that are
observed: `back` is said when they are inside again, `outside` when they are not and do not come nearer.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

from upshift.measure.band import SPREAD_FROM, deviation
from upshift.measure.stats import normal_quantile, t_quantile
from upshift.records.trial import Band

#: Rate of false alarms over a whole run that stays as it was when proven.
ALPHA = 0.01
#: Consecutive windows that must be outside the band.
IN_A_ROW = 2

#: Steps of the run's own windows: at first, and at most. Windows of its history.
SHORTEST, LONGEST, HISTORY = 16, 256, 64
#: Windows in a row that must have risen, and windows before them from which the scatter is known.
GROUP, KNOWN = 3, 12
#: What the loss must have risen by: this share of its fall, and of itself.
OF_FALL, OF_LEVEL = 0.5, 0.1

#: After a technique came off: windows that are watched; steps, a quarter of those so far between a least and a most;
#: and what the excess must have shrunk to for it to be watched on.
OBSERVED, LEAST, MOST, NEARER = 3, 20, 512, 0.75


class Signal(NamedTuple):
    """Something to act on. `step`: steps done. `loss`: mean of the window; `expected`, `limit`: what it was held
    against and the highest that is inside. `beyond`: held against the run's own best, not against the band."""

    kind: Literal["alarm", "back", "outside"]
    step: int
    loss: float
    expected: float
    limit: float
    beyond: bool


class _Sum:
    """Losses of the window under way."""

    __slots__ = ("count", "end", "first", "total")

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.total, self.count = 0.0, 0

    def take(self, losses: Sequence[float]) -> None:
        """Add losses of its steps; those that are not finite are somebody else's business."""
        total = sum(losses)
        if not math.isfinite(total):
            losses = [value for value in losses if math.isfinite(value)]
            total = sum(losses)
        self.total += total
        self.count += len(losses)


class _Open:
    """An alarm whose cause is not known yet: what comes after a technique was taken off."""

    def __init__(self, excess: float, beyond: float | None) -> None:
        """`excess` over what was expected; `beyond`: how far it may lie above the run's best, None within the band."""
        self.excess = excess
        self.beyond = beyond
        self.since: int | None = None
        self._inside = 0
        self._recent: list[float] = []

    def again(self, step: int) -> None:
        """Something was changed after so many steps."""
        self.since = step
        self._inside = 0
        self._recent = []

    def judge(self, window: _Sum, expected: float, limit: float) -> Literal["back", "outside"] | None:
        """What the windows since the change say; None: not enough, or it comes nearer."""
        since = self.since
        if since is None or window.first < since:
            return None
        loss = window.total / window.count
        self._recent.append(loss - expected)
        self._inside = self._inside + 1 if loss <= limit else 0
        if self._inside >= IN_A_ROW:
            return "back"
        long = len(self._recent) >= OBSERVED and window.end - since >= min(max(LEAST, since // 4), MOST)
        if self._inside or not long:
            return None
        latest = math.fsum(self._recent[-IN_A_ROW:]) / IN_A_ROW
        nearer = latest <= NEARER * self.excess
        self.excess = latest
        if nearer:
            self.again(window.end)
            return None
        self.since = None
        return "outside"


class Guard:
    """Takes in the losses of a run; says when they leave what was proven, and whether they come back."""

    def __init__(self, band: Band | None, alpha: float = ALPHA) -> None:
        """
        Args:
            band: what the proof saw; None: there is only the run's own past.
        """
        self.alpha = alpha / 2.0
        self._band = band
        self._limits = [] if band is None else limits(band, self.alpha)
        #: Higher than a window may be anywhere in the band.
        self.ceiling = max(self._limits, default=sys.float_info.max)
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._own = _Sum(step, step + SHORTEST)
        self._size = SHORTEST
        self._history: list[float] = []
        self._start = self._best = math.inf
        self._looks = 0
        self._at = -1
        self._row = 0
        self._open: _Open | None = None
        self._banded: _Sum | None
        self._next_banded()

    def _next_banded(self) -> None:
        self._at += 1
        self._banded = None
        band = self._band
        if band is not None and self._at < len(band.first):
            first = band.first[self._at]
            self._banded = _Sum(first, first + band.length[self._at])

    @property
    def observing(self) -> bool:
        """An alarm is open: what was done about it is being watched."""
        return self._open is not None

    def restart(self, step: int) -> None:
        """Another training begins at this step (a new optimizer): neither the band nor the past fit it."""
        self._band = None
        self._begin(step)

    def changed(self, step: int) -> None:
        """A technique came off after so many steps: what begins from there on is observed."""
        if self._open is not None:
            self._open.again(step)

    def add(self, steps: Sequence[int], losses: Sequence[float]) -> list[Signal]:
        """Take in losses with the steps they belong to (0 is the first; in order, one or several a step).

        Returns:
            What is to be acted on. After an alarm nothing is judged until `changed` is called.
        """
        signals: list[Signal] = []
        i, count = 0, len(steps)
        while i < count:
            step, banded, own = steps[i], self._banded, self._own
            if banded is not None and step >= banded.end:
                signals += self._close_banded(banded)
                while self._banded is not None and step >= self._banded.end:
                    self._next_banded()
                banded = self._banded
            if step >= own.end:
                signals += self._close_own(own)
                own = self._own = _Sum(step, step + self._size)
            end = own.end
            if banded is not None:
                end = min(end, banded.end if step >= banded.first else banded.first)
            after = bisect_left(steps, end, i)
            own.take(losses[i:after])
            if banded is not None and step >= banded.first:
                banded.take(losses[i:after])
            i = after
        return signals

    # -- within the band -----------------------------------------------------------------------------------------

    def _close_banded(self, window: _Sum) -> list[Signal]:
        """Hold a whole window against the one of the band at the same steps."""
        band = self._band
        if band is None or window.count < window.end - window.first:
            return []
        expected, limit = band.mean[self._at], self._limits[self._at]
        found = self._open
        if found is not None:
            return [] if found.beyond is not None else self._judged(found, window, expected, limit)
        mean = window.total / window.count
        self._row = self._row + 1 if mean > limit else 0
        if self._row < IN_A_ROW:
            return []
        self._open = _Open(mean - expected, None)
        return [Signal("alarm", window.end, mean, expected, limit, False)]

    # -- beyond it -----------------------------------------------------------------------------------------------

    def _close_own(self, window: _Sum) -> list[Signal]:
        """Hold a window against the best stretch of this run."""
        if not window.count:
            return []
        mean = window.total / window.count
        history = self._history
        history.append(mean)
        if self._start == math.inf:
            # A resumed run begins low: it is the proof that saw where the loss came from.
            self._start = mean if self._band is None else max(mean, self._band.mean[0])
        if len(history) >= GROUP:
            self._best = min(self._best, math.fsum(history[-GROUP:]) / GROUP)
        signals = self._look(window, mean) if self._banded is None else []
        if len(history) >= HISTORY and self._size < LONGEST:
            self._history = [(a + b) / 2.0 for a, b in zip(history[::2], history[1::2], strict=False)]
            self._size *= 2
        elif len(history) > HISTORY:
            del history[0]
        return signals

    def _look(self, window: _Sum, mean: float) -> list[Signal]:
        found, best = self._open, self._best
        if found is not None and found.beyond is not None:
            return self._judged(found, window, best, best + found.beyond)
        if found is not None and self._band is not None:
            return self._judged(found, window, self._band.mean[-1], self._limits[-1])
        before = self._history[-HISTORY // 2 - GROUP : -GROUP]
        if len(before) < KNOWN:
            return []
        self._looks += 1
        allowed = max(self.alpha / (self._looks * (self._looks + 1)), 1e-12)
        scatter = t_quantile(1.0 - allowed, len(before) - 2) * deviation(before)
        margin = max(scatter, OF_FALL * (self._start - best), OF_LEVEL * abs(best))
        if min(self._history[-GROUP:]) <= best + margin:
            return []
        self._open = _Open(mean - best, margin / 2.0)
        return [Signal("alarm", window.end, mean, best, best + margin, True)]

    def _judged(self, found: _Open, window: _Sum, expected: float, limit: float) -> list[Signal]:
        kind = found.judge(window, expected, limit)
        if kind is None:
            return []
        if kind == "back":
            # The excursion is no part of what this run usually does.
            self._open = None
            self._row = 0
            self._history = []
        loss = window.total / window.count
        return [Signal(kind, window.end, loss, expected, limit, found.beyond is not None)]


def limits(band: Band, alpha: float) -> list[float]:
    """The highest mean of each window that is inside, with a false alarm in a share `alpha` of runs at most."""
    count = len(band.first)
    result = []
    for i, (length, mean, spread, between) in enumerate(
        zip(band.length, band.mean, band.spread, band.between, strict=True)
    ):
        spent = alpha * ((i + 1) ** 1.5 - i**1.5) / count**1.5
        noise = t_quantile(1.0 - spent, SPREAD_FROM - 2) * spread * math.sqrt(2.0 / length)
        result.append(mean + math.hypot(normal_quantile(1.0 - spent) * between, noise))
    return result
