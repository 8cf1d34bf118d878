"""A job under way: its parts, how far it is, and what happens between two updates."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upshift.engine import firstbatch, loop
from upshift.engine.boundary import Boundary
from upshift.engine.loop import CHANGING, RESTING, Halted
from upshift.engine.optimizers import evaluating
from upshift.engine.preempt import StopRequest
from upshift.engine.recover import Recovery, Spikes
from upshift.engine.results import Results
from upshift.engine.scaling import Turns, not_measured, schedule
from upshift.engine.trouble import Trouble

if TYPE_CHECKING:
    from upshift.engine.parts import Parts
    from upshift.engine.recording import Recorder
    from upshift.engine.saving import Saving
    from upshift.sites import BackwardApplied

#: Seconds between two looks at the clock's business: windows of the record, progress, saving.
TICK = 0.25
WINDOW = 1.0


@dataclass
class Progress:
    """How far a training is.

    `cursor`: samples of the epoch under way that were trained. `evaluated`: the step of the last evaluation.
    `done`: it ended before its time, by its target or early stopping.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    samples: int = 0
    seconds: float = 0.0
    evaluated: int = -1
    done: bool = False


class Training:
    """What the loop works on. One per process."""

    def __init__(self, parts: Parts, recorder: Recorder, saving: Saving, stop: StopRequest) -> None:
        self.parts, self.recorder, self.saving, self.stop = parts, recorder, saving, stop
        self.job, self.settings, self.group = parts.job, parts.settings, parts.group
        self.model, self.optimizer = parts.model, parts.optimizer
        self.clip, self.average = parts.job.clip, parts.average
        self.progress = Progress()
        self.recovery = Recovery()
        self.spikes = Spikes()
        self.trouble = Trouble(self)
        self.halted = False
        self.results = Results(parts.job)
        self.before_step: tuple[Any, ...] = (self._first_step,)
        self.loss: Any = self._first_loss
        self.forward: Any = self._first_forward
        self.scaling: BackwardApplied | None = None
        self._parameters = list(parts.parameters)
        self.rate = parts.schedule
        self._began = self._tick = self._window = time.perf_counter()
        self._spiking = parts.settings.spikes
        self.alone = parts.group.world == 1
        self.description = parts.description
        self.boundary = stop.late = Boundary(self)
        parts.asked = lambda: stop.asked
        self._losses, self._samples = recorder.losses, 0
        self.evaluated_samples = 0.0
        recorder.epochs = self._epochs_made
        self._in_evaluation = False
        self._stop_at, self._save_every = parts.settings.stop_at, saving.every
        # What the ranks agreed on: a rank that acted by itself would leave the others waiting.
        self._all_stop = self._all_save = False
        self._turns: Turns | None = None
        self.efficiency = not_measured("the run ended before one rank alone was timed")

    def begins(self) -> None:
        """Everything is restored: the clocks start."""
        self._began = self._tick = self._window = time.perf_counter()
        self._samples = self.progress.samples
        self.recorder.rewound(self.progress.step)
        self._ticked = self.progress.step
        if self.alone and self.stop.asked:
            self.halt()
        if not self.alone:
            self._take_turns()

    def _take_turns(self) -> None:
        """Time one rank alone in the first updates, where the run is long enough."""
        steps = self.parts.span.steps
        left = None if steps is None else steps - self.progress.step
        overlaps = self.group.device.type == "cuda"
        kinds, why = schedule(left, sharded=self.settings.parallel == "fsdp2", overlaps=overlaps)
        if kinds:
            self._turns = Turns(self.group, kinds)
        else:
            self.efficiency = not_measured(why)

    def _no_turns(self, why: str) -> None:
        self._turns, self.efficiency = None, not_measured(why)

    def _timed(self) -> None:
        """An update is made that took part in timing one rank alone."""
        if self._turns is not None:
            found = self._turns.ends()
            self.efficiency = found or self.efficiency
            if self._turns.over:
                self._turns = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before it was resumed included."""
        return self.progress.seconds + time.perf_counter() - self._began

    @property
    def speed(self) -> float | None:
        """Samples per second of all ranks since this process began to train; None where it trained none."""
        trained = self.progress.samples - self._samples
        return trained / (time.perf_counter() - self._began) if trained > 0 else None

    def _epochs_made(self) -> float | None:
        length = self.parts.data.length
        return None if not length else self.progress.epoch + self.progress.cursor / length

    # -- how far ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the job is done."""
        if self.stopping:
            return True
        if self.job.steps is not None:
            return self.progress.step >= self.job.steps
        return self.progress.epoch >= (self.job.epochs or 0)

    @property
    def stopping(self) -> bool:
        """Whether it ends before its time."""
        return self.halted or self.progress.done

    def epoch_begins(self) -> None:
        """Before the first batch, or after going back."""
        self.model.train()
        every, step = self.job.eval_every, self.progress.step
        if every is not None and step and step % every == 0:
            self.evaluate()  # a run that was stopped in the middle of it
        self.boundary.rest()

    def batches(self) -> Iterator[Any]:
        """What is left of this epoch, one global batch at a time, without those that are left out."""
        data, progress = self.parts.data, self.progress
        left_out = set(self.recovery.left_out)
        on_batch = self.settings.on_batch
        last = self.job.steps
        if not left_out and on_batch is None and last is None and self._turns is None:
            yield from data.epoch(progress.epoch, progress.cursor)
            return
        for batch in data.epoch(progress.epoch, progress.cursor):
            if left_out and (progress.epoch, progress.cursor) in left_out:
                progress.cursor += batch.samples
                continue
            if on_batch is not None:
                on_batch(progress.step, progress.epoch, [index for part in batch.parts for index in part.indices])
            if self._turns is not None and self.scaling is not None:
                self._no_turns("a scaled gradient makes the ranks agree in the middle of a step")
            if self._turns is not None:
                self._turns.begins(batch)
            yield batch
            if last is not None and progress.step >= last:
                return

    def epoch_ends(self) -> None:
        """All samples of the epoch were trained (or the last step was made): evaluate, save."""
        progress = self.progress
        last = progress.step == self.job.steps or progress.epoch + 1 == self.job.epochs
        if self.job.eval_data is not None and (self.job.eval_every is None or last):
            # Before the epoch is counted: a run stopped in here comes back to it.
            self.evaluate()
        self.boundary.enter(CHANGING)
        if progress.step != self.job.steps:
            progress.epoch, progress.cursor = progress.epoch + 1, 0
        if self.alone:
            self._save_if_due()

    def ends(self) -> None:
        """The loop is over; what it came to is saved."""
        self.boundary.close()
        self.saving.last(self)
        self.stop.safe.set()

    # -- one update ---------------------------------------------------------------------------------------------

    def _first_forward(self, batch: Any) -> tuple[Any, Any]:
        """Let the techniques act on the model that is about to be called for the first time."""
        self.parts.model_seen(batch)
        if self.progress.step:
            for name, why in self.parts.stage.inexact().items():
                self.say("resume", f"{name}: {why}")
        self.forward = self.parts.make_forward()
        self.scaling = self.parts.stage.backward()
        return firstbatch.forward(self.forward, batch)

    def _first_loss(self, output: Any, target: Any) -> Any:
        found = firstbatch.loss(self.parts.loss, output, target)
        self.loss = self.parts.loss
        return found

    def agree(self, batch: Any, total: float, counts: list[Any], trouble: BaseException | None) -> float:
        """The mean loss of the global batch; all ranks go on with it, or none does.

        Raises:
            Again: somebody ran out of memory, or the loss cannot be used.
        """
        if self.alone and trouble is None and not counts:
            if -math.inf < total < math.inf:
                return total
            return self.trouble.unusable(batch, total)
        if self._turns is not None:
            self._turns.computed()
        count = math.fsum(float(item) for item in counts)
        wrong, lost = not math.isfinite(total), 0.0
        if not self.alone:
            sums = self.group.agree([0.0 if wrong else total, count, float(trouble is not None), float(wrong),
                                     float(self.stop.asked),
                                     float(self.group.main and self.saving.due(self.progress.step + 1)),
                                     float(batch.lost)])  # fmt: skip
            total, count, lost = sums[0], sums[1], sums[6]
            if sums[4]:
                self.stop.ask("another rank was asked to stop")
                self._all_stop = True
            self._all_save = sums[5] > 0
            if sums[2]:
                self.trouble.out_of_memory(trouble)
            if sums[3]:
                total = math.nan
        elif trouble is not None:
            self.trouble.out_of_memory(trouble)
        loss = total / count if counts else total / self.group.world
        if not math.isfinite(loss):
            return self.trouble.unusable(batch, loss)
        if not self.alone:
            self.group.reduce_gradients(self._parameters)
        if counts:
            self._scale_gradients(self.group.world / count)
        elif lost:
            # Samples that could not be read: weights were those of the whole batch.
            self._scale_gradients(batch.samples / (batch.samples - lost))
        if self._turns is not None:
            self._turns.agreed()
        return loss

    def _scale_gradients(self, factor: float) -> None:
        import torch

        gradients = [item.grad for item in self._parameters if item.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def clip_gradients(self) -> None:
        """Scale the gradient down to the norm that the job allows."""
        self.group.clip_gradients(self._parameters, self.clip or math.inf)

    def _first_step(self, optimizer: Any) -> None:
        """Let the techniques act on the optimizer that is about to make its first step."""
        self.before_step = self.parts.optimizer_seen()
        for before in self.before_step:
            before(optimizer)

    def unscaled(self, optimizer: Any) -> bool:
        """Whether the gradients, which are those of the loss itself afterwards, can be used; the ranks agree on it.

        Raises:
            Again: not at any scale. The technique that scales is taken off.
        """
        scaling = self.scaling
        if scaling is None or scaling.unscaled(optimizer):
            return True
        if scaling.problem and self.parts.stage.names:
            self.trouble.go_back(f"{scaling.problem} at step {self.progress.step + 1}", [], 0)
        self.recorder.event(
            "overflow", f"gradients of step {self.progress.step + 1} have overflowed: no optimizer step is made of them"
        )
        return False

    def drop_gradients(self) -> None:
        """Before an update is tried again."""
        if self._turns is not None:
            self._no_turns("an update was made again while one rank alone was timed")
        self.optimizer.zero_grad(set_to_none=True)

    def updated(self, batch: Any, loss: float) -> None:
        """An update was made: count it, and see to what is due."""
        if self._turns is not None:
            self._timed()
        progress, results = self.progress, self.results
        spike = self.spikes.add(loss, progress.epoch, progress.cursor) if self._spiking else None
        progress.step += 1
        progress.cursor += batch.samples
        progress.samples += batch.samples
        results.trained += loss
        results.updates += 1
        self._losses.append(loss)
        if spike:
            self.trouble.spiked(spike, loss, batch.samples)
        boundary = self.boundary
        boundary.phase, boundary.note = RESTING, None
        if progress.step == self._stop_at:
            self.stop.ask("a stop at this step")
            self._all_stop = True
        if self.stop.asked or time.perf_counter() - self._tick > TICK:
            self._tick_now(loss)
        if self._all_save or self.halted or (self._save_every and not progress.step % self._save_every):
            self._save_if_due()
        every = self.job.eval_every
        if every is not None and progress.step % every == 0 and not self.halted:
            self.evaluate()
        if boundary.noting and not self.halted:
            boundary.rest()

    def _tick_now(self, loss: float) -> None:
        now, made = time.perf_counter(), self.progress.step - self._ticked
        if made > 0:
            self.boundary.paced((now - self._tick) / made)
        self._tick, self._ticked = now, self.progress.step
        if now - self._window > WINDOW:
            self._window = now
            self.recovery.passed(self.progress.step)
            self.recorder.window(self.progress.step)
        if self.settings.progress is not None:
            self.settings.progress(self.report(loss))
        self.poll()
        if self.alone and not self.halted:
            self._save_if_due()

    def _save_if_due(self) -> None:
        if self._all_save or (self.alone and self.saving.due(self.progress.step)):
            self._all_save = False
            if not self.spikes.suspicious:
                self.boundary.enter(CHANGING)
                self.saving.save(self)
                self.boundary.phase = RESTING

    def poll(self) -> None:
        """Whether somebody asked to stop. Ranks agree on it in `agree`; in evaluation only a run alone can stop.

        Raises:
            Halted: in the middle of an evaluation, which a resumed run makes again.
        """
        if self.alone and self.stop.asked:
            if self._in_evaluation:
                raise Halted
            self.halt()
        elif self._all_stop:
            self.halt()

    def halt(self) -> None:
        """Save, and end the loop."""
        self.halted = True

    def report(self, loss: float) -> dict[str, float]:
        """What a progress bar shows."""
        progress = self.progress
        return {
            **({"steps": self.parts.span.steps} if self.parts.span.steps else {}),
            "step": progress.step, "epoch": progress.epoch, "samples": progress.samples, "loss": loss,
            "seconds": time.perf_counter() - self._began, "trained": progress.samples - self._samples,
            "cursor": progress.cursor, **self.results.last,
        }  # fmt: skip

    def say(self, kind: str, text: str) -> None:
        """To the record and to the person (once, not from every rank)."""
        self.recorder.event(kind, text)
        if self.group.rank == 0:
            self.settings.say(text)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def metrics(self) -> Any:
        """Fresh metrics of the job."""
        return self.parts.new_metrics()

    @property
    def output_has_loss(self) -> bool:
        """Whether the loss comes with the output of the model."""
        return self.job.loss is None

    def evaluation_parts(self) -> Iterator[Any]:
        """The evaluation data of this rank."""
        return iter(self.parts.evaluation_parts())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, with the averaged weights where the job has them."""
        self._in_evaluation = True
        self.model.eval()
        swapped = self.average.swapped() if self.average is not None else contextlib.nullcontext()
        boundary = self.boundary
        try:
            boundary.enter(CHANGING)
            with evaluating(self.optimizer), swapped:
                boundary.computes()
                try:
                    yield
                finally:
                    boundary.enter(CHANGING)
        finally:
            boundary.computes()
            self.model.train()
            self._in_evaluation = False

    def evaluate(self) -> None:
        """Evaluate now; say it, remember the best, stop where the job says so."""
        if self.progress.evaluated == self.progress.step:
            return
        self.boundary.before_evaluation()
        found, seconds = loop.timed_evaluation(self)
        self.boundary.after_evaluation(seconds)
        self.progress.evaluated = self.progress.step
        self.recorder.evaluated(seconds, self.progress.step, found, self.evaluated_samples)
        self.saving.evaluated(self.results.take(self, found))
        if self.settings.metrics is not None and self.group.main:
            self.settings.metrics(self.progress.step, self.progress.epoch + 1, found)
        if self.parts.schedule is not None:
            self.parts.schedule.evaluated(found["loss"])
        self._tick, self._ticked = time.perf_counter(), self.progress.step
        self.boundary.phase, self.boundary.note = RESTING, None
