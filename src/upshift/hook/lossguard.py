"""What a planned run does when its loss leaves the band of the proof: techniques come off one by one.

The least exact comes off first. Each time the loss is then observed, and what came of it is said. A loss outside the
band never stops a run: other data or resumed weights may be the reason, and then the techniques were taken off for
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from upshift.records.trial import Band
from upshift.sites import Stage

if TYPE_CHECKING:
    from upshift.hook.watch import Watch
    from upshift.measure.guard import Guard, Signal


class LossGuard:
    """Holds the losses of a run against the band of its plan."""

    def __init__(self, options: dict[str, Any], stage: Stage, watch: Watch, take_off: Callable[[str, str], None],
                 tell: Callable[[str], None]) -> None:  # fmt: skip
        """
        Args:
            options: `band` as in the plan file, or None; `suspects`: technique -> numerics, the most suspect first.
            take_off: takes one technique off, with the reason.
            tell: says something to the person and to the log.
        """
        # The first step has ended by now: the start of a run is the user's time.
        from upshift.measure.guard import Guard

        self._guard: Guard | None = Guard(msgspec.convert(options["band"], Band | None))
        #: A single loss above this is worth a look before the window of the record ends.
        self.ceiling = self._guard.ceiling
        self._suspects: dict[str, str] = dict(options["suspects"])
        self._stage, self._watch = stage, watch
        self._take_off, self._tell = take_off, tell
        self._optimizers = len(watch.optimizers)
        self._off: list[str] = []

    def knows(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Take in what the loss of this run was before the techniques came on."""
        if self._guard is not None and self._guard.add(steps, losses):
            # It rose by itself: that past is no measure.
            self._guard.restart(self._watch.index)

    @property
    def done(self) -> bool:
        """Nothing is on any more, and nothing is being observed."""
        return self._guard is None or not (self._stage.names or self._guard.observing)

    def add(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses with the number of the step each belongs to (0 is the first)."""
        guard = self._guard
        if guard is None:
            return
        if len(self._watch.optimizers) > self._optimizers:
            # Another model, another fold, or more of the model thawed: another training, with another loss.
            self._optimizers = len(self._watch.optimizers)
            guard.restart(self._watch.index)
            self.ceiling = sys.float_info.max
            return
        for signal in guard.add(steps, losses):
            if signal.kind == "back":
                self._tell(f"step {signal.step}: the loss is back {_where(signal)} since {_names(self._off)} came off")
                self._off.clear()
            else:
                self._suspect(guard, signal)

    def _suspect(self, guard: Guard, signal: Signal) -> None:
        on = self._stage.names
        left = [name for name in dict.fromkeys((*self._suspects, *on)) if name in on]
        again = "still " if signal.kind == "outside" else ""
        seen = f"the loss is {again}{signal.loss:.4g}, {_where(signal, outside=True)}"
        if not left:
            self._guard = None
            self._tell(
                f"step {signal.step}: {seen}, although the script runs {self._untouched()}: what keeps it there is "
                "not the plan but the training itself (other data, resumed weights, a seed that learns later), or "
                "harm that does not heal"
            )
            return
        name = left[0]
        kind = self._suspects.get(name)
        others = _names(left[1:])
        stays = f"{others} stay{'s' if len(left) == 2 else ''}" if others else "training goes on without techniques"
        self._take_off(name, seen)
        self._off.append(name)
        self._tell(f"step {signal.step}: {seen}; {name}{f' ({kind})' if kind else ''} came off, {stays}")
        guard.changed(self._watch.index)

    def _untouched(self) -> str:
        kept = [name for name, reason in self._stage.outside.items() if not reason]
        return f"untouched but for {_names(kept)}, which acts until the process ends" if kept else "untouched"

    def finish(self) -> None:
        """Say so where the script ended before it was seen whether the loss came back."""
        if self._guard is not None and self._guard.observing and self._off:
            self._tell(f"the script ended before it was seen whether the loss came back without {_names(self._off)}")


def _where(signal: Signal, outside: bool = False) -> str:
    figures = f"(expected {signal.expected:.4g}, at most {signal.limit:.4g})"
    if signal.beyond:
        return f"risen far above its best {figures}" if outside else f"near its best {figures}"
    return f"above the band of the proof {figures}" if outside else f"in the band of the proof {figures}"


def _names(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else "".join(names)
