"""What a training has come to: its evaluations, the best of them, and what follows from them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from upshift.engine.job import Job, higher_is_better
from upshift.engine.stopping import OverfittingAlarm

if TYPE_CHECKING:
    from upshift.engine.training import Training


class Results:
    """The evaluations of one training.

    `last` and `best` are metrics by name; `reached` holds step and seconds at which the target was reached.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.reached: dict[str, float] = {}
        self._early = job.stop_early.begin() if job.stop_early is not None else None
        self._alarm = OverfittingAlarm()
        self._warned = False
        self.trained, self.updates = 0.0, 0
        """Sum of the training losses since the last evaluation, and how many they are."""
        target = job.target
        if target is not None:
            self.name, self._higher = target.metric, target.higher
        elif job.stop_early is not None:
            self.name, self._higher = job.stop_early.metric, job.stop_early.higher
        else:
            self.name = next(iter(job.metrics), "loss")
            self._higher = higher_is_better(self.name)

    def take(self, t: Training, found: dict[str, float]) -> bool:
        """A new evaluation: remember it, say what follows; returns whether it is the best so far."""
        self.last = found
        if self.name not in found:
            names = ", ".join(found)
            t.say("metric", f"there is no metric {self.name!r} in what was evaluated ({names})")
            return False
        value, before = found[self.name], self.best.get(self.name)
        best = not math.isnan(value) and (before is None or (value > before if self._higher else value < before))
        if best:
            self.best = dict(found)
        self._look_at_target(t, value)
        self._look_for_overfitting(t, found["loss"])
        if self._early is not None and self._early.update(found, t.progress.step) and not t.progress.done:
            t.progress.done = True
            t.say(
                "early stop", f"{self.name} has not become better; the best was {self.best.get(self.name, value):.5g}"
            )
        return best

    def _look_at_target(self, t: Training, value: float) -> None:
        target = self.job.target
        if target is None or self.reached or not target.reached(value):
            return
        self.reached = {"step": t.progress.step, "seconds": t.seconds}
        t.say("target", f"{self.name} {value:.5g}: the target {target.value:g} is reached after {t.seconds:.1f} s")
        t.progress.done = t.progress.done or self.job.stop_at_target

    def _look_for_overfitting(self, t: Training, evaluation: float) -> None:
        total, n = self.trained, self.updates
        self.trained, self.updates = 0.0, 0
        if not n or math.isnan(evaluation):
            return
        found = self._alarm.update(t.progress.step, total / n, evaluation)
        if found is not None and not self._warned:
            self._warned = True
            t.say("overfitting", found.text())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "last": self.last, "best": self.best, "reached": self.reached, "warned": self._warned,
            "trained": self.trained, "updates": self.updates, "alarm": self._alarm.state_dict(),
            "early": self._early.state_dict() if self._early is not None else {},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.last, self.best, self.reached = dict(state["last"]), dict(state["best"]), dict(state["reached"])
        self._warned = state["warned"]
        self.trained, self.updates = state["trained"], state["updates"]
        self._alarm.load_state_dict(state["alarm"])
        if self._early is not None and state["early"]:
            self._early.load_state_dict(state["early"])
