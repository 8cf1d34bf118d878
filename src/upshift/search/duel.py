"""Two fresh resident processes that pass a token: one runs a block of steps, the other is stopped.

The noise of a machine is slow drift, so arms alternate fast, in ABBA quads with randomised sign. The idle arm's
whole process group is stopped, so that loader workers can neither refill queues nor steal cores meanwhile.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from upshift.measure.paired import Sequential, binomial_tail
from upshift.measure.steps import median_of
from upshift.records.plan import Setting
from upshift.records.trial import Pairing
from upshift.sites.runner import Child, ChildGone, ChildSpec, Runner
from upshift.units import binary

ArmPlan = dict[str, dict[str, Setting]]

#: A block lasts about this long (seconds), and at most this many steps.
BLOCK_SECONDS = 0.05
MOST_STEPS = 24
#: Of what the candidate's own clock saves, this part at least must be saved on the clock outside, or it is held to it.
SEEN = 0.8


class ArmFailed(Exception):
    """An arm crashed, hung or could not apply its plan. `arm` is 0 (reference) or 1 (candidate)."""

    def __init__(self, arm: int, reason: str, techniques: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.arm = arm
        self.reason = reason
        self.techniques = techniques


class TooLarge(ArmFailed):
    """The candidate holds more than it may."""


@dataclass
class Arm:
    """What one process has done so far."""

    number: int
    child: Child
    plan: ArmPlan
    seconds: dict[int, float] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    backwards: dict[int, int] = field(default_factory=dict)
    epoch_starts: list[tuple[int, float]] = field(default_factory=list)
    data: dict[int, float] = field(default_factory=dict)
    optimizer: dict[int, float] = field(default_factory=dict)
    startup: float = 0.0
    optimizers: int = 1
    ended: bool = False
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    isolation: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    effects: dict[str, str] = field(default_factory=dict)
    running: bool = True
    device_memory: int = 0
    """The most bytes it has reserved on the accelerator so far; 0 where it uses none."""
    resident: int = 0
    """The most bytes its main process has held in host memory so far."""

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.seconds)

    def no_effect(self) -> dict[str, str]:
        """Techniques that have done nothing in this process so far, with the reason."""
        return {name: text for name, text in self.effects.items() if text and name in self.plan}

    def take(self, message: dict[str, Any]) -> list[float]:
        """Keep a report of steps; returns their seconds."""
        first = int(message["first"])
        seconds = [float(value) for value in message["seconds"]]
        self.optimizers = int(message.get("optimizers", 1))
        self.problems.update(message.get("problems", {}))
        self.device_memory = max(self.device_memory, int(message.get("device_memory", 0)))
        self.resident = max(self.resident, int(message.get("resident", 0)))
        self.effects = dict(message.get("effects", {}))
        for offset, value in enumerate(seconds):
            index = first + offset
            self.seconds[index] = value
            self.losses[index] = [float(item) for item in message["losses"][offset]]
            self.backwards[index] = int(message["backwards"][offset])
            self.data[index] = float(message["data"][offset])
            self.optimizer[index] = float(message["optimizer"][offset])
            if message["epochs"][offset]:
                self.epoch_starts.append((index, self.data[index]))
        return seconds

    def step_loss(self, index: int) -> float | None:
        """Mean loss over the backward calls of a step."""
        values = self.losses.get(index)
        return math.fsum(values) / len(values) if values else None

    def epoch_cost(self) -> float | None:
        """Seconds an epoch start costs beyond an ordinary step (making the iterator, starting workers)."""
        if not self.epoch_starts:
            return None
        starts = {index for index, _ in self.epoch_starts}
        usual = median_of([value for index, value in self.data.items() if index not in starts])
        # A second and later epoch shows the cost that recurs; the first also pays for imports.
        later = [value for index, value in self.epoch_starts if index > 0]
        return max(median_of(later or [value for _, value in self.epoch_starts]) - usual, 0.0)


class Duel:
    """Arm 0 (reference) against arm 1 (candidate)."""

    def __init__(
        self, runner: Runner, base: ChildSpec, *, timeout: float = 120.0, seed: int = 0, patience: float | None = None,
        fit: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            base: the target and options both arms share.
            timeout: seconds without an answer after which an arm counts as hung.
            patience: the same for the start-up, until the first step has ended.
            fit: bytes the candidate may hold, on the accelerator where it trains on one; None: no limit.
        """
        self.runner = runner
        self.base = base
        self.timeout = timeout
        self.fit = fit
        self.patience = patience if patience is not None else timeout
        self.random = random.Random(seed)
        self.arms: list[Arm] = []
        self.ended = False
        """The script came to its end while the arms alternated; what was seen before stands."""

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, plan: ArmPlan, *, options: dict[str, Any] | None = None) -> Arm:
        """Start the next arm and let it make its first step; it is then stopped."""
        number = len(self.arms)
        if number:
            self._make_sure_two_fit()
        spec = msgspec.structs.replace(
            self.base, mode="arm", plan=plan, options={**self.base.options, **(options or {})}
        )
        arm = Arm(number, self.runner.start(spec, name="AB"[number] if number < 2 else str(number)), plan)
        self.arms.append(arm)
        message = self._receive(arm, self.patience, "ready")
        arm.take(message["step"])
        arm.startup = float(message.get("startup", 0.0))
        self._check(arm)
        self._pause(arm)
        return arm

    def _make_sure_two_fit(self) -> None:
        held, available = self.arms[0].child.memory()
        if held * 1.1 > available:
            raise ArmFailed(
                1,
                f"two copies of the script do not fit in memory: one holds {binary(held)}, {binary(available)} are "
                "left; nothing that needs a fresh process beside it can be confirmed here",
            )

    def _check_room(self, arm: Arm) -> None:
        if self.fit is None:
            return
        held = self.held(arm)
        if held > self.fit:
            raise TooLarge(arm.number, f"needs {binary(held)} (measured), --fit allows {binary(self.fit)}")

    def held(self, arm: Arm) -> int:
        """The most bytes an arm has held so far: on the accelerator where it uses one, else its processes in host
        memory."""
        return arm.device_memory or max(arm.resident, arm.child.memory()[0])

    def replace(self, number: int, plan: ArmPlan, *, options: dict[str, Any] | None = None) -> Arm:
        """End an arm and start another in its place."""
        self.arms[number].child.kill()
        kept = self.arms
        self.arms = kept[:number]
        try:
            arm = self.start(plan, options=options)
        finally:
            self.arms = self.arms[: number + 1] + kept[number + 1 :]
        return arm

    def close(self) -> None:
        """End all processes."""
        for arm in self.arms:
            arm.child.kill()

    def _pause(self, arm: Arm) -> None:
        if arm.running:
            arm.child.pause()
            arm.running = False

    def _resume(self, arm: Arm) -> None:
        if not arm.running:
            arm.child.resume()
            arm.running = True

    def _check(self, arm: Arm) -> None:
        """A technique that came off or failed while being applied has not been measured."""
        for kind, name, text in arm.notes:
            if kind in ("off", "failed") and name in arm.plan:
                raise ArmFailed(arm.number, text, (name,))
        for name, text in arm.problems.items():
            raise ArmFailed(arm.number, text, (name,))

    def _receive(self, arm: Arm, timeout: float, kind: str) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            message = arm.child.receive(max(deadline - time.monotonic(), 0.0))
            if message is None:
                raise ArmFailed(arm.number, f"no step ended within {timeout:.0f} s; it hangs or is far slower")
            found = message.get("kind")
            if found == kind:
                return message
            if found == "note":
                arm.notes.append((message["what"], message["technique"], message["text"]))
            elif found == "isolation":
                arm.isolation = f"{message['rung']}: {message['detail']}"
            elif found == "refused":
                raise ArmFailed(arm.number, message["text"])
            elif found == "failed":
                raise ArmFailed(arm.number, message["text"], tuple(message["techniques"]))
            elif found == "ended":
                if message.get("code") == 0:
                    arm.ended = True
                    raise Ended(arm.number, int(message.get("steps", 0)))
                raise ArmFailed(arm.number, f"the script ended: {message['how']}")
            elif found == "gone":
                raise ArmFailed(arm.number, _last_words(arm.child, message.get("code")))

    # -- steps ---------------------------------------------------------------------------------------------------

    def go(self, arm: Arm, steps: int, timeout: float | None = None) -> list[float]:
        """Let an arm run some steps while the other is stopped; returns their seconds."""
        self._resume(arm)
        try:
            arm.child.send({"kind": "go", "steps": steps})
        except ChildGone:
            raise ArmFailed(arm.number, _last_words(arm.child, None)) from None
        seconds = arm.take(self._receive(arm, timeout or self.timeout, "steps"))
        self._pause(arm)
        self._check(arm)
        return seconds

    def ask(self, arm: Arm, request: dict[str, Any], answer: str, timeout: float | None = None) -> dict[str, Any]:
        """Send another request and wait for its answer."""
        self._resume(arm)
        try:
            arm.child.send(request)
        except ChildGone:
            raise ArmFailed(arm.number, _last_words(arm.child, None)) from None
        message = self._receive(arm, timeout or self.timeout, answer)
        self._pause(arm)
        return message

    def level(self, steps: int, stop: Callable[[], bool] = lambda: False, chunk: int = 10) -> None:
        """Bring both arms to `steps` steps, in turns, so that their losses can be paired."""
        while not stop():
            behind = [arm for arm in self.arms if arm.steps < steps]
            if not behind:
                return
            arm = min(behind, key=lambda item: item.steps)
            self.go(arm, min(chunk, steps - arm.steps))

    def block_steps(self) -> tuple[int, int]:
        """Steps of a block, and how many of them are not counted (fast steps: caches are cold after a switch)."""
        slow = max(median_of(list(arm.seconds.values())[-8:]) for arm in self.arms)
        if slow >= BLOCK_SECONDS:
            return 1, 0
        steps = min(math.ceil(BLOCK_SECONDS / max(slow, 1e-5)), MOST_STEPS)
        return steps + 1, 1

    def fight(
        self, seconds: float, *, on_quad: Callable[[Sequential, float], None] | None = None, decide: bool = True
    ) -> tuple[str, Pairing | None]:
        """Alternate in ABBA quads until decided (or, without `decide`, until the time is up).

        Returns the decision and the interval, which holds under the stopping rule.
        """
        steps, ignored = self.block_steps()
        sequential = Sequential(seconds)
        turns: list[Turns] = []
        began = time.monotonic()
        while True:
            order = (0, 1, 1, 0) if self.random.random() < 0.5 else (1, 0, 0, 1)
            sums, inside, outside = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
            try:
                for number in order:
                    turn = time.monotonic()
                    every = self.go(self.arms[number], steps)
                    outside[number] += time.monotonic() - turn
                    inside[number] += math.fsum(every)
                    sums[number] += math.fsum(every[ignored:]) / max(len(every[ignored:]), 1)
            except Ended:
                if len(sequential.quads) < 4:
                    raise
                self.ended = True
                break
            elapsed = time.monotonic() - began
            turns.append(Turns(inside[0], inside[0] - inside[1], outside[0] - outside[1]))
            if min(sums) > 0:
                value = math.log(sums[0] / sums[1])
                if decide:
                    sequential.add(value, elapsed)
                elif math.isfinite(value):
                    sequential.quads.append(value)
            if on_quad is not None:
                on_quad(sequential, elapsed)
            if sequential.decision != "go on" or sequential.time_is_up(elapsed):
                break
        self._check_room(self.arms[1])
        decision = sequential.finish()
        found = sequential.pairing((self.step(0), self.step(1)))
        if found is not None and decision == "faster":
            found = seen_outside(found, turns)
            decision = "faster" if found.low > sequential.at_least else "no change"
        return decision, found

    def step(self, number: int) -> float:
        """Median seconds of a steady step of an arm."""
        values = list(self.arms[number].seconds.values())
        return median_of(values[len(values) // 4 :])


class Turns(NamedTuple):
    """Seconds of one quad: of all steps of the reference, what the candidate saved of them by the steps' own clock,
    and what it saved by the clock of the search."""

    reference: float
    inside: float
    outside: float


def seen_outside(pairing: Pairing, turns: Sequence[Turns]) -> Pairing:
    """Hold a speed-up to what the clock of the search sees of it.

    A step's seconds are told by the process that is judged, without evaluation and checkpoints. Work that is moved
    into those, or behind the end of a step, and a clock that goes wrong, show only outside. What a turn itself costs
    is the same for both arms, and cancels.
    """
    gain = median_of([item.inside for item in turns])
    missed = sum(item.outside < SEEN * gain for item in turns)
    # A quad with evaluation in one arm says little, so most quads have to agree (sign test).
    if missed < len(turns) and binomial_tail(missed, len(turns)) >= 0.01:
        return pairing
    reference = median_of([item.reference for item in turns])
    left = reference - median_of([item.outside for item in turns])
    factor = min((reference - gain) / left, 1.0)
    return msgspec.structs.replace(
        pairing,
        ratio=pairing.ratio * factor,
        low=pairing.low * factor,
        high=pairing.high * factor,
        method=pairing.method + ", held to what the clock outside saw",
    )


class Ended(Exception):
    """The script came to its end during a trial."""

    def __init__(self, arm: int, steps: int) -> None:
        super().__init__(f"the script ended after {steps} steps")
        self.arm = arm
        self.steps = steps


def _last_words(child: Child, code: int | None) -> str:
    """Why a process is gone, in the script's own words."""
    lines = [line for line in child.output().strip().splitlines() if line.strip()]
    tail = lines[-1] if lines else ""
    if code == -9 and not tail:
        return "killed (out of memory?)"
    if code is not None and code < 0:
        return f"killed by signal {-code}" + (f": {tail}" if tail else "")
    return tail or f"ended with exit code {code}"
