"""The time of a sample in evaluation: the median over the evaluations of a run, loading of their data included."""

from __future__ import annotations

import statistics

from upshift.records.quantity import Quantity
from upshift.units import seconds as in_words

#: Evaluations whose time is kept; of more, every second one, then every fourth, ...
MOST = 256


class InferenceTime:
    """Takes in one evaluation after the other. The first one warms up, and is left out where there are three."""

    def __init__(self) -> None:
        self.evaluations = 0
        """How many there were, those of which the samples are not known included."""
        self._first: float | None = None
        self._kept: list[float] = []
        self._stride = 1

    def add(self, seconds: float, samples: float) -> None:
        """An evaluation took so long for so many samples (not above 0, or NaN: not known)."""
        self.evaluations += 1
        if not (samples > 0 and seconds >= 0):
            return
        if self._first is None:
            self._first = seconds / samples
        elif self.evaluations % self._stride == 0:
            self._kept.append(seconds / samples)
            if len(self._kept) > MOST:
                self._kept, self._stride = self._kept[1::2], 2 * self._stride

    @property
    def found(self) -> Quantity | None:
        """Seconds of a sample with the least and the most over evaluations; None: none was seen."""
        if self._first is None:
            return None
        kept = self._kept if len(self._kept) >= 2 else [self._first, *self._kept]
        low, high = (min(kept), max(kept)) if len(kept) > 1 else (None, None)
        return Quantity(statistics.median(kept), "s", low, high, len(kept))

    @property
    def told(self) -> str:
        """What `found` says and holds, in words; empty where there is none."""
        found = self.found
        if found is None or found.value is None:
            return ""
        over = f"median of {found.n:,} evaluations" if found.n > 1 else "one evaluation"
        return f"{in_words(found.value)} a sample, {over}, loading of their data included"
