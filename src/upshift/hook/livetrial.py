"""One live technique tried inside a real run: it alternates with what is on so far, and owes evidence to stay.

Everything here is a generator that is sent the record of every step: between two steps it says which techniques are on
in the next, and all steps are the run's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upshift.hook.alternation import Alternation
from upshift.hook.drain import drain
from upshift.hook.replay import Call, CannotReplay, Recorder, parameter_names, replay
from upshift.measure.inrun import Differences, Sample, as_random, compare_replays, judge_losses, judge_norms
from upshift.measure.steps import StepRecord, evaluates_apart, total_loss, training_seconds
from upshift.measure.updates import Precision
from upshift.records.plan import Setting
from upshift.records.trial import Pairing
from upshift.sites import Numerics, Technique

if TYPE_CHECKING:
    from upshift.hook.watch import Watch
    from upshift.sites import Stage

#: Batches that are replayed without and with the technique.
REPLAYS = 3
#: A block of steps lasts about so long (seconds), but has at most so many steps.
BLOCK_SECONDS, MOST_STEPS = 0.05, 3
#: Steps per arm whose gradients and losses are looked at.
MOST_SAMPLES = 96


@dataclass(frozen=True)
class LiveCandidate:
    """A live technique with settings to try."""

    technique: Technique
    settings: dict[str, Setting]
    numerics: Numerics
    gain: float

    @property
    def name(self) -> str:
        """The technique's own."""
        return self.technique.card.name

    @property
    def label(self) -> str:
        """`threads(intra=2)`."""
        inside = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class Outcome:
    """What came of a trial; `reason` in words, with the figures."""

    kept: bool
    reason: str


class LiveTrial:
    """Tries one candidate on top of what is on."""

    def __init__(
        self, torch: Any, stage: Stage, watch: Watch, switch: Callable[[tuple[str, ...]], None],
        recent: deque[StepRecord],
    ) -> None:  # fmt: skip
        """
        Args:
            switch: puts exactly these techniques in effect for the steps to come.
            recent: the last steps, kept up to date by the caller.
        """
        self._torch, self._stage, self._watch = torch, stage, watch
        self._switch = switch
        self._recent = recent
        self._norms: list[Any] = []
        self._names: list[str] = []
        self._samples: list[tuple[int, bool, tuple[Any, ...], list[Any]]] = []

    def run(
        self, candidate: LiveCandidate, on: tuple[str, ...], seconds: float, level: float, step: float, seed: int
    ) -> Generator[None, StepRecord, Outcome]:
        """The trial. The candidate is on the stage and in effect afterwards only if it was kept.

        Args:
            on: what is on so far.
            seconds: how long it may take.
            level: one-sided level of the bounds of the speed-up.
            step: seconds a step takes.
        """
        name = candidate.name
        self._stage.add(candidate.technique, candidate.settings, self._watch.past_moments())
        self._switch(on)
        try:
            if name not in self._stage.acted:
                return Outcome(False, f"no effect: {self._stage.effects().get(name) or 'nothing to act on'}")
            outcome = yield from self._alternate(candidate, on, seconds, level, step, seed)
        except BaseException:
            self._drop(name, on)
            raise
        if not outcome.kept:
            self._drop(name, on)
        return outcome

    def _drop(self, name: str, on: tuple[str, ...]) -> None:
        self._stage.remove(name, "", quietly=True)
        self._watch.refresh()
        self._switch(tuple(item for item in on if item in self._stage.names))

    def _alternate(
        self, candidate: LiveCandidate, on: tuple[str, ...], seconds: float, level: float, step: float, seed: int
    ) -> Generator[None, StepRecord, Outcome]:
        plan = (*on, candidate.name)
        block = min(max(int(BLOCK_SECONDS / max(step, 1e-6)), 1), MOST_STEPS)
        alternation = Alternation(on, plan, seconds, block=block, seed=seed, level=level)
        handle = self._listen()
        try:
            self._switch(alternation.next_arm())
            while True:
                record = yield
                if any(item not in self._stage.names for item in plan):
                    return Outcome(False, "it failed: the techniques were taken off")
                ended = self._took(alternation, record)
                decided = alternation.sequential.decision == "faster"
                if ended and not (decided and self._thin() and alternation.time_left()):
                    break
                self._switch(alternation.next_arm())
        finally:
            handle.remove()
            self._switch(on)
        decision, pairing = alternation.result()
        if decision != "faster" or pairing is None:
            return Outcome(False, f"{_words(pairing)}: {_not_faster(decision)}")
        samples = self._read()
        said = []
        for judged in (judge_norms(samples, self._names), judge_losses(samples)):
            if judged.answer != "alike":
                return Outcome(False, f"{_words(pairing)}, but {judged.reason}")
            said.append(judged.reason)
        return (yield from self._replayed(candidate, on, pairing, said))

    def _replayed(
        self, candidate: LiveCandidate, on: tuple[str, ...], pairing: Pairing, said: list[str]
    ) -> Generator[None, StepRecord, Outcome]:
        """Paired evidence: single batches once more, without and with the technique."""
        gradient = update = 0.0
        for _ in range(REPLAYS):
            recorder = Recorder()
            name = recorder.card.name
            self._stage.add(recorder, {}, self._watch.past_moments())
            self._watch.refresh()
            self._switch((*on, name))
            try:
                yield
            finally:
                self._drop(name, on)
            try:
                precision = candidate.technique.card.precision
                found = compared(self._watch, recorder.calls, on, candidate.name, candidate.numerics, precision)
            except CannotReplay as error:
                return Outcome(False, f"{_words(pairing)}, but its gradients could not be compared: {error}")
            except Exception as error:
                return Outcome(False, f"{_words(pairing)}, but the comparison failed: {type(error).__name__}: {error}")
            if found.reason:
                return Outcome(False, f"{_words(pairing)}, but {found.reason}")
            gradient, update = max(gradient, found.gradient), max(update, found.update)
        if candidate.name not in self._stage.names:
            return Outcome(False, "it failed: the techniques were taken off")
        self._switch((*on, candidate.name))
        said.append(f"{REPLAYS} batches replayed: gradient off by {gradient:.1g}, update by {update:.1g}")
        return Outcome(True, f"{_words(pairing)}; {', '.join(said)}")

    # -- what the real steps show --------------------------------------------------------------------------------

    def _listen(self) -> Any:
        """Norms of the gradients before every optimizer step (torch's own hook), while arms alternate."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._norms, self._samples, self._names = [], [], []
        names = parameter_names(self._watch)

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            if len(self._samples) >= 2 * MOST_SAMPLES:
                return
            try:
                parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                if not self._samples:
                    self._names += [names.get(id(p), "a parameter") for p in parameters]
                self._norms.append(self._torch._foreach_norm([p.grad for p in parameters]))
            except Exception:
                # Sparse gradients, for one. The step is the script's: what is not seen is not shown.
                self._norms = []

        return register_optimizer_step_pre_hook(before)

    def _took(self, alternation: Alternation, record: StepRecord) -> bool:
        """Take in a step. Returns whether the comparison has ended."""
        norms, self._norms = self._norms, []
        seconds = training_seconds(record, evaluates_apart(self._recent))
        if alternation.block_ends():
            seconds += drain(self._torch, self._watch)
        if alternation.skip:
            self._names = []
        elif len(self._samples) < 2 * MOST_SAMPLES:
            number = len(alternation.quads)
            self._samples.append((number, bool(alternation.current), record.losses, norms))
        return alternation.add(seconds)

    def _read(self) -> list[Sample]:
        result = []
        for quad, with_it, losses, norms in self._samples:
            values = tuple(float(item) for item in losses[:8])
            flat = [float(value) for optimizer in norms for value in optimizer]
            result.append(Sample(quad, with_it, total_loss(values), flat))
        return result

    def _thin(self) -> bool:
        """Whether more steps could show more."""
        if len(self._samples) >= 2 * MOST_SAMPLES:
            return False
        samples = self._read()
        return "not shown" in (judge_norms(samples, self._names).answer, judge_losses(samples).answer)


def compared(
    watch: Watch, calls: Sequence[Call], on: tuple[str, ...], name: str, kind: Numerics, precision: Precision
) -> Differences:
    """One batch without and with a technique, with dropout as it is; where its masks differ, also without dropout.

    Raises:
        CannotReplay: nothing can be compared.
    """
    plan = (*on, name)
    pair = replay(watch, calls, on, plan)
    found = compare_replays(*pair, kind, precision)
    if not found.reason or kind is Numerics.BITWISE:
        return found
    without = replay(watch, calls, on, plan, dropout=False)
    return compare_replays(*without, kind, precision) if as_random(pair, without) else found


def _not_faster(decision: str) -> str:
    return "slower" if decision == "slower" else "inside the noise, or below 1 %"


def _words(pairing: Pairing | None) -> str:
    if pairing is None:
        return "too few blocks to tell"
    return f"{pairing.ratio:.3f}x [{pairing.low:.3f}, {pairing.high:.3f}], {pairing.quads} quads"
