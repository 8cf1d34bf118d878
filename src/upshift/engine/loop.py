"""The training loop. Everything that is not the mathematics hangs on `Training` and is in other files.

One update is one global batch, in as many micro-batches as are needed; its gradient is that of the whole batch at once:

    for every micro-batch:   loss = job.loss(model(inputs), target);  (loss * weight).backward()
    then:                    agree, clip, step, schedule, average
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any

from upshift.engine.job import Weighted
from upshift.engine.memory import is_out_of_memory

if TYPE_CHECKING:
    from upshift.engine.training import Training


#: What the loop is doing: nothing that changes the state, what changes buffers and random states, or anything.
RESTING, COMPUTING, CHANGING = range(3)

#: One process has nobody to wait for.
ALONE = contextlib.nullcontext()


class Again(Exception):
    """The epoch is to be entered again at its cursor: after going back, or with smaller micro-batches."""


class Halted(Exception):
    """Somebody asked to stop, in the middle of an evaluation or of an update that is not made."""


def train(t: Training) -> None:
    """Train to the end of the job, or until somebody asks to stop."""
    while not t.finished:
        try:
            t.epoch_begins()
            for batch in t.batches():
                loss = gradient(t, batch)
                update(t)
                t.updated(batch, loss)
                if t.stopping:
                    break
            else:
                t.epoch_ends()
        except Again:
            t.drop_gradients()
        except Halted:
            t.halt()
        except Exception as error:
            if not t.boundary.failed(error):
                raise
            t.halt()
    t.ends()


def gradient(t: Training, batch: Any) -> float:
    """The gradient of one global batch, in `.grad`, and its mean loss; nothing is updated yet.

    Raises:
        Again: it cannot be used (not finite, out of memory on some rank).
    """
    boundary = t.boundary
    if boundary.note is None and batch.samples not in boundary.sizes:
        boundary.new_size(batch.samples)
    boundary.phase = COMPUTING
    if boundary.taken:
        boundary.give_way()
    total = 0.0
    counts: list[Any] = []
    trouble: BaseException | None = None
    parts = batch.parts if t.alone else t.parts.in_step(batch, t.parts.data.micro_batch)
    for part in parts:
        try:
            with ALONE if t.alone else t.group.no_sync(last=part is parts[-1]):
                output, target = t.forward(part.batch)
                loss = t.loss(output, target)
                if type(loss) is Weighted:
                    # Sums add up to that over the global batch; what they are divided by is known at the end.
                    loss, count = loss if part.weight else (loss.total * 0.0, 0.0)
                    counts.append(count)
                elif part.weight != 1.0:
                    loss = loss * part.weight
                (loss if t.scaling is None else t.scaling.scaled(loss)).backward()
            total += loss.item()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            trouble = error
            break
    return t.agree(batch, total, counts, trouble)


def update(t: Training) -> None:
    """Clip, step, schedule, average. Where a scaled gradient has overflowed, there is no step.

    Raises:
        Again: gradients are not finite at any scale.
    """
    boundary = t.boundary
    boundary.phase = CHANGING
    if boundary.taken:
        boundary.give_way()
    optimizer = t.optimizer
    if t.scaling is None or t.unscaled(optimizer):
        for before in t.before_step:
            before(optimizer)
        if t.clip is not None:
            t.clip_gradients()
        if t.rate is not None:
            t.rate(t.progress.step)  # also where updates were left out: a function of the step
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if t.average is not None:
        t.average.update()


def evaluate(t: Training) -> dict[str, float]:
    """Metrics and mean loss over the evaluation data, with the averaged weights where the job has them."""
    import torch

    metrics = t.metrics()
    total, count, samples = 0.0, 0.0, 0.0
    with t.evaluating(), torch.no_grad():
        for part in t.evaluation_parts():
            output, target = t.forward(part.batch)
            if t.job.loss is not None or t.output_has_loss:
                loss = t.loss(output, target)
                if type(loss) is Weighted:
                    total, count = total + float(loss.total), count + float(loss.count)
                else:
                    total, count = total + loss.item() * part.n, count + part.n
            metrics.update(output, target, part.n)
            samples += part.n
            t.poll()
    total, count, t.evaluated_samples = t.group.sum([total, count, samples])
    found: dict[str, float] = metrics.compute()
    return {**found, "loss": total / count if count else math.nan}


def timed_evaluation(t: Training) -> tuple[dict[str, float], float]:
    """`evaluate` and the seconds it took."""
    began = time.perf_counter()
    return evaluate(t), time.perf_counter() - began
