"""When more training does not help: early stopping, and an alarm for overfitting.

Both look at evaluations only, have no clock and no randomness, and their state is JSON: told the same values, a resumed
run stops where an uninterrupted one does.

Sources: Prechelt 1998, "Early Stopping - But When?", on patience; a line fitted by least squares, Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from upshift.engine.job import higher_is_better
from upshift.errors import UsageError
from upshift.measure.stats import t_quantile


@dataclass(frozen=True)
class EarlyStop:
    """Stop after `patience` evaluations in a row that were not better than the best by more than `min_delta`.

    Args:
        metric: which one; `loss` is the loss on the evaluation data.
        patience: evaluations, at least 1. min_delta: in units of the metric, at least 0.
        mode: `max` or `min`; empty: by the name of the metric.
    """

    metric: str = "loss"
    patience: int = 5
    min_delta: float = 0.0
    mode: Literal["max", "min", ""] = ""

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min", ""):
            raise UsageError(f"mode = {self.mode!r} is neither 'max' nor 'min'.", remedy="Take one of them.")
        if self.patience < 1:
            raise UsageError(f"patience = {self.patience!r}.", remedy="Give at least 1 evaluation.")
        if not 0 <= self.min_delta < math.inf:
            raise UsageError(f"min_delta = {self.min_delta!r}.", remedy="Give 0 or a small positive number.")

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return higher_is_better(self.metric) if not self.mode else self.mode == "max"

    def begin(self) -> Stopper:
        """A stopper that has seen nothing yet."""
        return Stopper(self)


class Stopper:
    """Counts evaluations for one `EarlyStop`, and remembers the best."""

    def __init__(self, rule: EarlyStop) -> None:
        self.rule = rule
        self.best: float | None = None
        """The best value so far; None before the first finite one."""
        self.best_at = 0
        """Which evaluation it was, counted from 1; or the step, where steps are told."""
        self.seen = 0
        self.since = 0
        """Evaluations since the best."""

    @property
    def stops(self) -> bool:
        """Whether patience is at its end."""
        return self.since >= self.rule.patience

    def update(self, values: Mapping[str, float], step: int | None = None) -> bool:
        """Tell one evaluation; returns whether to stop.

        Args:
            values: of all metrics by name, of which the rule's counts. One that is not finite is not better.
            step: optimizer steps made, to remember the best by.

        Raises:
            UsageError: the metric is not among the values.
        """
        if self.rule.metric not in values:
            raise UsageError(
                f"Early stopping watches {self.rule.metric!r}, which is not evaluated.",
                remedy=f"Evaluated are: {', '.join(values)}.",
            )
        value = values[self.rule.metric]
        self.seen += 1
        if self._better(value):
            self.best, self.since = value, 0
            self.best_at = self.seen if step is None else step
        else:
            self.since += 1
        return self.stops

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        if self.rule.higher:
            return value > self.best + self.rule.min_delta
        return value < self.best - self.rule.min_delta

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as JSON."""
        return {"best": self.best, "best_at": self.best_at, "seen": self.seen, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.best = None if state["best"] is None else float(state["best"])
        self.best_at, self.seen, self.since = int(state["best_at"]), int(state["seen"]), int(state["since"])


@dataclass(frozen=True)
class Overfitting:
    """The training loss falls while the evaluation loss rises beyond its noise.

    Args:
        step: when it was seen. best_step, best: the lowest evaluation loss and when.
        rise: of the evaluation loss over the window, from the line through it. half_width: of its 95 % interval.
        fall: of the training loss over the window. evaluations: in the window.
    """

    step: int
    best_step: int
    best: float
    rise: float
    half_width: float
    fall: float
    evaluations: int

    def text(self) -> str:
        """The finding as a sentence."""
        return (
            f"overfitting: over the last {self.evaluations} evaluations the loss on the evaluation data rose by "
            f"{self.rise:.3g} (± {self.half_width:.2g}, 95 %) while the training loss fell by {self.fall:.3g}; "
            f"the lowest was {self.best:.5g} at step {self.best_step}"
        )


class OverfittingAlarm:
    """Watches pairs of training and evaluation loss, and tells once for each rise.

    A line is laid through the last `window` evaluations. The alarm needs a slope of the evaluation loss above zero at
    `level`, a slope of the training loss below zero at the 1 % level (both one-sided, Student's t with window - 2
    degrees of freedom), and a lowest evaluation loss that lies before the window or is its first. What the line does
    not explain counts as noise, so a bend counts against the alarm.
    Limits: needs window + 1 evaluations. Noise that goes on from one evaluation to the next (a wandering loss) looks
    like a trend. Simulated with the defaults, 50 evaluations a training and no overfitting: 3 % of 2,000 trainings had
    an alarm with independent noise; of 500 each, 12 % where neighbours correlate at 0.5, 40 % at 0.9. A rise per
    evaluation of one standard deviation of the noise was found in 82 % of 500, of two in all.

    Args:
        window: evaluations, at least 4. level: chance of a false alarm at one evaluation with independent noise.
    """

    def __init__(self, window: int = 6, level: float = 0.001) -> None:
        if window < 4 or not 0 < level < 0.5:
            raise UsageError(f"window = {window!r}, level = {level!r}.", remedy="Give window >= 4, 0 < level < 0.5.")
        self._window = window
        self._rises, self._falls = t_quantile(1 - level, window - 2), t_quantile(0.99, window - 2)
        self._half = t_quantile(0.975, window - 2)
        self._last: list[tuple[int, float, float]] = []
        self._best: tuple[int, float] | None = None
        self._seen = self._best_at = 0
        self._told = False

    def update(self, step: int, training: float, evaluation: float) -> Overfitting | None:
        """Tell one evaluation; values that are not finite are left out.

        Args:
            step: optimizer steps made. training: mean training loss since the evaluation before. evaluation: the loss
                on the evaluation data.
        """
        if not (math.isfinite(training) and math.isfinite(evaluation)):
            return None
        self._seen += 1
        self._last = [*self._last, (step, training, evaluation)][-self._window :]
        if self._best is None or evaluation < self._best[1]:
            self._best, self._best_at, self._told = (step, evaluation), self._seen, False
        if self._told or self._seen <= self._window or self._best_at > self._seen - self._window + 1:
            return None
        slope, error = _line([item[2] for item in self._last])
        falling, doubt = _line([item[1] for item in self._last])
        if not (slope > self._rises * error and -falling > self._falls * doubt):
            return None
        self._told = True
        gaps = self._window - 1
        return Overfitting(step, *self._best, slope * gaps, self._half * error * gaps, -falling * gaps, self._window)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as JSON."""
        return {
            "last": [list(item) for item in self._last],
            "best": None if self._best is None else list(self._best),
            "best_at": self._best_at,
            "seen": self._seen,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._last = [(int(step), float(first), float(second)) for step, first, second in state["last"]]
        best = state["best"]
        self._best = None if best is None else (int(best[0]), float(best[1]))
        self._best_at, self._seen, self._told = int(state["best_at"]), int(state["seen"]), bool(state["told"])


def _line(values: list[float]) -> tuple[float, float]:
    """Slope per place, and its standard error, of the least-squares line through equally spaced values (3 or more)."""
    n = len(values)
    middle, mean = (n - 1) / 2, math.fsum(values) / n
    spread = n * (n * n - 1) / 12  # sum of (place - middle)^2
    slope = math.fsum((at - middle) * (value - mean) for at, value in enumerate(values)) / spread
    rest = math.fsum((value - mean - slope * (at - middle)) ** 2 for at, value in enumerate(values))
    return slope, math.sqrt(rest / (n - 2) / spread)
