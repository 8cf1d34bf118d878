"""Train a job from its beginning, or from where it was stopped, to its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.engine import loop
from upshift.engine.group import Group
from upshift.engine.job import Job
from upshift.engine.parts import Parts
from upshift.engine.preempt import StopRequest
from upshift.engine.recording import Recorder
from upshift.engine.saving import Saving
from upshift.engine.scaling import sentence
from upshift.engine.settings import Execution
from upshift.engine.training import Training
from upshift.errors import UpshiftError

if TYPE_CHECKING:
    import torch

#: The training ended as it should.
DONE = 0


@dataclass(frozen=True)
class Result:
    """What a training came to.

    `metrics` are those of the last evaluation, `best` those of the best one (by the target's metric, else the first).
    `code` is what a process should exit with: 0, or that of the signal that asked it to stop (143, 130).
    `reached`: step and seconds at which the target was reached; empty where it was not.
    """

    steps: int
    samples: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    code: int = DONE
    how: str = ""
    model: torch.nn.Module | None = None

    @property
    def finished(self) -> bool:
        """Whether the job came to its end (it can be resumed where it did not)."""
        return self.code == DONE


def train_job(job: Job, settings: Execution | None = None, outside: dict[str, str] | None = None) -> Result:
    """Train `job` in this process; in every process of a group, where a launcher has started several.

    Raises:
        UsageError: its parts do not fit.
        InUseError: another run owns the run folder.
        ResumeError: the folder holds another training.
        TrainingError: the loss is not finite, and going back does not help.
    """
    settings = settings or Execution()
    began = time.perf_counter()
    with Group.here(device=settings.device, say=settings.say) as group:
        recorder = Recorder(settings.out if group.main else None, began)
        store = None
        if settings.out is not None:
            from upshift.checkpoint.store import Store

            # The thread that saves agrees with the other ranks beside the training.
            channel = group.channel()
            store = Store(
                settings.out, rank=group.rank, world=group.world, gather=channel.gather, broadcast=channel.broadcast,
                say=lambda text: _tell(recorder, settings, group, "checkpoint", text),
            )  # fmt: skip
            store.acquire()
            if group.main and settings.owned is not None:
                settings.owned(settings.out)
        try:
            return _train(job, settings, group, recorder, store, outside or {})
        finally:
            if store is not None:
                store.close()


def _tell(recorder: Recorder, settings: Execution, group: Group, kind: str, text: str) -> None:
    recorder.event(kind, text)
    if group.main:
        settings.say(text)


def _train(job: Job, settings: Execution, group: Group, recorder: Recorder, store: Any,
           outside: dict[str, str]) -> Result:  # fmt: skip
    def say(kind: str, name: str, text: str) -> None:
        _tell(recorder, settings, group, kind, f"{kind} {name}: {text}" if name else text)

    parts = Parts(job, settings, group, say, outside)
    stop = StopRequest(settings.grace, settings.say, settings.notice, process_ends=settings.process_ends)
    saving = Saving(parts, store)
    training = Training(parts, recorder, saving, stop)
    recorder.start(
        job=settings.reference or job.name, arguments=(), plan_file=settings.plan_file, techniques=settings.plan,
        environment=settings.environment, first=0, planned=parts.span.steps,
        parameters=sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
    )  # fmt: skip
    if settings.planned is not None:
        settings.planned(parts.span.steps)
    error: BaseException | None = None
    try:
        if settings.signals:
            stop.__enter__()
        saving.resume(training)
        saving.begin(training)
        training.begins()
        loop.train(training)
        if group.world > 1 and training.speed is not None:
            training.say("scaling", sentence(training.speed, group.world, training.efficiency))
    except BaseException as raised:
        error = raised
        training.boundary.close()
        raise
    finally:
        stop.safe.set()
        _finish(training, parts, saving, recorder, stop, error)
    progress = training.progress
    halted = training.halted
    return Result(
        steps=progress.step,
        samples=progress.samples,
        seconds=training.seconds,
        metrics=training.results.last,
        best=training.results.best,
        reached=training.results.reached,
        folder=settings.out,
        code=stop.code if halted else DONE,
        how=f"{stop.why}: {training.boundary.kept or f'stopped after step {progress.step:,}'}" if halted else "",
        model=parts.model,
    )


def _finish(training: Training, parts: Parts, saving: Saving, recorder: Recorder, stop: StopRequest,
            error: BaseException | None) -> None:  # fmt: skip
    for name, reason in parts.stage.effects().items():
        if reason:
            training.say("no effect", f"no effect {name}: {reason}")
    try:
        saving.close()
    except UpshiftError as problem:
        training.say("checkpoint", str(problem))
    code = 1 if error is not None else stop.code if training.halted else DONE
    how = f"{type(error).__name__}: {error}" if error is not None else stop.why if training.halted else ""
    recorder.end(code, how, training.progress.step)
    parts.close()
    stop.__exit__()
