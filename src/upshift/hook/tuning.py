"""`run --tune`: techniques are tried inside the real run, and what wins stays on.

Live techniques alternate with what is on so far, in blocks of the run's own steps; nothing is thrown away. One that is
faster must show, on those steps, that it leaves losses and gradients alone (`livetrial`, `measure/inrun.py`). When the
time is over, this is a guarded run like any other; where nothing was kept, one that is only recorded.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import Any

from upshift.hook.controller import describe
from upshift.hook.guarded import WINDOW, RunController
from upshift.hook.livetrial import LiveCandidate, LiveTrial
from upshift.hook.lossguard import LossGuard
from upshift.hook.replay import Recorder
from upshift.hook.scriptfacts import Traits, script_facts
from upshift.measure.anatomy import anatomy
from upshift.measure.steps import StepRecord, loss_values, merged, total_loss
from upshift.records import Measurement
from upshift.sites import Numerics
from upshift.sites.risk import suspicion
from upshift.sites.runner import ChildSpec
from upshift.techniques import registry
from upshift.units import seconds as in_words

#: Steps of warm-up: so many, or fewer where those take this share of the time; and what is left of it for the trials.
WARM_STEPS, LEAST_WARM, WARM_SHARE = 30, 12, 0.1
#: A trial is not begun where the time does not reach for so many steps: eight quads, and batches to be replayed.
LEAST_STEPS = 40
#: One-sided error of the bounds of all speed-ups together.
ALPHA = 0.01
#: Steps by which evaluation is told from training.
RECENT = 512


class TuningController(RunController):
    """A run that tunes itself in its first minutes."""

    window = 0.0

    def __init__(self, spec: ChildSpec) -> None:
        super().__init__(spec)
        self.seconds = float(spec.options["tune"])
        self.traits = Traits()
        self.search: Generator[None, StepRecord, None] | None = None
        self.unlogged: list[StepRecord] = []
        self.recent: deque[StepRecord] = deque(maxlen=RECENT)
        self.past: tuple[list[int], list[float]] = ([], [])
        self.kept: dict[str, LiveCandidate] = {}
        self.tried = 0
        self.first_step = 0.0
        self.to_try: list[LiveCandidate] = []

    def torch_ready(self, torch: ModuleType) -> None:
        """Listen for what techniques must know, from the first step on."""
        super().torch_ready(torch)
        self.watch.may_sleep = False
        self.traits.listen(torch)
        self.search = self._search()
        next(self.search)

    def say(self, kind: str, name: str, text: str) -> None:
        """What is only tried is not said."""
        if self.search is None or kind != "applied":
            super().say(kind, name, text)

    def on_step(self, record: StepRecord) -> None:
        """While tuning, every step on its own; the log still gets windows."""
        if self.search is None:
            super().on_step(record)
            return
        self.recent.append(record)
        self.unlogged.append(record)
        if record.at - self.unlogged[0].at >= WINDOW:
            self._log_steps()
        try:
            self.search.send(record)
        except StopIteration:
            self._settle()
        except Exception as error:
            self._tell(f"it failed ({describe(error)}); what was kept by then stays on")
            self._settle()

    def rescue(self, module: Any, names: tuple[str, ...], error: Exception) -> None:
        """An error that passes through nothing but a recorded call is the script's own."""
        names = tuple(name for name in names if name != Recorder.card.name)
        if not names:
            raise error
        super().rescue(module, names, error)

    def finish(self, error: BaseException | None) -> None:
        """Say so where the script ended before the tuning did."""
        if self.search is not None and self.recent:
            self._tell(f"the script ended first: {self.tried} of {len(self.to_try)} candidates were tried")
            self.search.close()
            self._settle()
        super().finish(error)

    # -- the search ----------------------------------------------------------------------------------------------

    def _search(self) -> Generator[None, StepRecord, None]:
        records = [(yield)]
        began = self.first_step = time.perf_counter()
        deadline = began + self.seconds
        if self.torch.distributed.is_available() and self.torch.distributed.is_initialized():
            self._tell("not done, since several processes train together")
            return
        while len(records) < WARM_STEPS and (
            len(records) < LEAST_WARM or time.perf_counter() - began < WARM_SHARE * self.seconds
        ):
            records.append((yield))
        seen = self._measurement(records)
        self.traits.close()
        self.to_try = self._candidates(seen)
        if not self.to_try:
            self._tell("no live technique applies to this script")
            return
        step = seen.anatomy.step.or_else(records[-1].total)
        trial = LiveTrial(self.torch, self.stage, self.watch, self._switch, self.recent)
        level = 1.0 - ALPHA / len(self.to_try)
        order = random.Random()  # the script's own stream must not be touched
        for number, candidate in enumerate(self.to_try):
            left = deadline - time.perf_counter()
            if left < LEAST_STEPS * step:
                self._tell(f"the time is over: {self.tried} of {len(self.to_try)} candidates were tried")
                return
            if reason := self._in_the_way(candidate):
                self._tell(f"not tried {candidate.label}: {reason}")
                continue
            share = max(left / (len(self.to_try) - number), LEAST_STEPS * step)
            on = tuple(self.kept)
            outcome = yield from trial.run(candidate, on, share, level, step, order.randrange(2**31))
            self.tried += 1
            if outcome.kept:
                self.kept[candidate.name] = candidate
            if any(name not in self.stage.names for name in self.kept):
                self.kept = {name: item for name, item in self.kept.items() if name in self.stage.names}
                self._tell(f"ended early: {outcome.reason}")
                return
            self._tell(f"{'kept' if outcome.kept else 'not kept'} {candidate.label}: {outcome.reason}")

    def _measurement(self, records: Sequence[StepRecord]) -> Measurement:
        spec = self.spec
        facts = script_facts(self.watch, self.traits, self.torch, "" if spec.module else spec.target)
        found = anatomy(records, startup=None, on_device=facts.device != "cpu")
        return Measurement(script=spec.target, arguments=spec.arguments, created="", anatomy=found, facts=facts)

    def _candidates(self, seen: Measurement) -> list[LiveCandidate]:
        """Live techniques that apply, the most promising first."""
        found = []
        kind = seen.facts.device.split(":")[0]
        for technique in registry.all_techniques():
            card = technique.card
            if card.switchable != "live" or kind not in card.tested_on:
                continue
            verdict = technique.check(seen)
            if not verdict.applies:
                continue
            for chosen in verdict.candidates or ({},):
                ((_, settings),) = registry.in_order({card.name: dict(chosen)})
                numerics = technique.numerics(settings, seen.facts)
                if numerics in (Numerics.BITWISE, Numerics.ROUNDING):
                    found.append(LiveCandidate(technique, settings, numerics, verdict.gain or 1.0))
        return sorted(found, key=lambda item: -item.gain)

    def _in_the_way(self, candidate: LiveCandidate) -> str:
        if candidate.name in self.kept:
            return "it is on with other settings"
        for name, other in self.kept.items():
            if name in candidate.technique.card.conflicts or candidate.name in other.technique.card.conflicts:
                return f"{name} is on, the two do not go together"
        return ""

    def _switch(self, names: tuple[str, ...]) -> None:
        """Let exactly these techniques be in effect from here on, and guard as long as one is."""
        if self.stage.switch(names):
            self.watch.refresh()
        self.guarding = any(name != Recorder.card.name for name in names)
        self.watch.on_loss = self.on_loss = self._check_loss if self.guarding else None

    # -- afterwards ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """The rest of the run: windows of steps, and a guard where something stays on."""
        self.search = None
        self.traits.close()
        self._log_steps()
        self.watch.window = WINDOW
        for name in self.stage.names:
            if name not in self.kept:
                self.stage.remove(name, "", quietly=True)
        self.watch.refresh()
        on = tuple(self.kept)
        self._switch(on)
        self.log.append("techniques", techniques={name: item.settings for name, item in self.kept.items()})
        took = in_words(time.perf_counter() - self.first_step)
        self.recent.clear()
        if not on:
            self.watch.may_sleep = True
            self._tell(f"done within {took}: nothing stays on; training goes on as the script was written")
            return
        order = sorted(
            self.kept.values(), key=lambda item: suspicion(item.numerics, item.technique.card.precision), reverse=True
        )
        suspects = {item.name: str(item.numerics) for item in order}
        self.loss_guard = LossGuard(
            {"band": None, "suspects": suspects}, self.stage, self.watch, self._remove, self._say_guard
        )
        self.loss_guard.knows(*self.past)
        self.looks_at_losses = True
        self._tell(
            f"done within {took}: {' + '.join(on)} stays on, guarded. Proof 'update', within this run: the trajectory "
            "was not paired with an untouched one; upshift tune makes a plan with that proof"
        )

    def _log_steps(self) -> None:
        """Write the steps since the last window of the log."""
        if not self.unlogged:
            return
        window, self.unlogged = self.unlogged, []
        for item in window:
            loss = total_loss(loss_values(item))
            if loss is not None:
                self.past[0].append(item.number)
                self.past[1].append(loss)
        super().on_step(merged(window))

    def _tell(self, text: str) -> None:
        self._event("tuning", text)
        self._print(f"tuning: {text}")
