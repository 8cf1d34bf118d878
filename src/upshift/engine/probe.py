"""Does a micro-batch of this size run? Tried in a process of its own, which may die of it.

    python -m upshift.engine.probe '{"reference": "jobs.py:cifar", "size": 64, "share": 512, "report": "out.json"}'

The job is built as for training, techniques of the plan included. Then come three updates with optimizer state, two
passes each (gradients are held while the second runs), on copies of the largest sample; between them the data as it is
(its shapes leave other gaps in memory and other kernels in caches than one shape does) and one evaluation batch. Memory
is capped at `HEADROOM` of the limit, so that "it fits" leaves room by construction: on CUDA by the allocator's own
share, on the CPU by RLIMIT_DATA, with `BESIDE` less where that is more (private writable memory, in use or only
reserved, so what is allowed is never more than the limit; not on macOS and Windows, where the peak alone is held
against it).

Limits. Nothing is written and nothing is learnt from the values. Loader workers are not started: they are processes of
their own. Memory of the CUDA context counts where `limit` is not given (what is free is looked up after it is there).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from upshift.engine.batches import moved
from upshift.engine.heaviest import heaviest, opened
from upshift.engine.job import Job, Weighted
from upshift.engine.memory import is_out_of_memory
from upshift.engine.microbatch import HEADROOM
from upshift.records.plan import Setting
from upshift.units import binary

if TYPE_CHECKING:
    import torch

    from upshift.engine.parts import Parts

#: Updates made, as many as it takes until optimizer state, gradients and activations have met.
STEPS = 3

#: What a training has in memory on the CPU beside what is tried: stacks of its threads, modules, and above all kernels
#: in the cache of oneDNN, one for each shape it meets (1,024 at most). Measured: 26 to 55 MiB in four updates of one
#: job; with 64 MiB one of 51 sizes failed (samples of many lengths, three at a time).
BESIDE = 128 * 2**20

#: Seconds in which a pass is timed, and passes at most.
TIMED, MOST_TIMED = 0.3, 20

#: Passes over the data as it is, at most, and the seconds after which no other is begun.
REAL, REAL_SECONDS = 16, 3.0


class Request(msgspec.Struct, frozen=True):
    """What to try.

    `size`: samples of a pass. `share`: samples of a rank in a global batch. `limit`: bytes, None: what is free.
    `settings`: values for `--set`. `plan`: techniques. `train_index`, `eval_index`: the largest samples, where they are
    known. `scan_seconds`: how long to look for them otherwise. `report`: the file to write.
    """

    reference: str
    size: int
    share: int
    report: str
    limit: int | None = None
    device: str = ""
    settings: dict[str, str] = {}
    plan: dict[str, dict[str, Setting]] = {}
    train_index: int | None = None
    eval_index: int | None = None
    scan_seconds: float = 5.0


class Report(msgspec.Struct):
    """How it went. `error`: something else than memory; `scanned`: what was looked through for the largest sample."""

    fits: bool = False
    peak_bytes: int | None = None
    limit: int | None = None
    seconds: float | None = None
    why: str = ""
    error: str = ""
    batch_norm: str = ""
    train_index: int | None = None
    eval_index: int | None = None
    scanned: str = ""
    where: str = "the start"


def run(request: Request) -> Report:
    """Try it here. This process stays under its limit from then on, so it is of no other use."""
    from upshift.engine.group import pick_device
    from upshift.engine.reference import load_job

    report = Report()
    try:
        device = pick_device(request.device, 0)
        report.limit = cap(device, request.limit)
        _try(load_job(request.reference, dict(request.settings)), request, device, report)
        report.fits = True
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if is_out_of_memory(error):
            report.why = f"out of memory in {report.where} ({first or type(error).__name__})"
        else:
            report.error = f"{type(error).__name__}: {error}"
    report.peak_bytes = peak(device) if report.limit is not None else None
    if report.fits and report.limit is not None and (report.peak_bytes or 0) > HEADROOM * report.limit:
        # What the cap does not count (pages of files) counts here.
        report.fits = False
        report.why = (
            f"it held {binary(report.peak_bytes or 0)} of memory, {HEADROOM:.0%} of {binary(report.limit)} are allowed"
        )
    return report


def cap(device: torch.device, limit: int | None) -> int:
    """Keep this process below `HEADROOM` of `limit` bytes on `device` (None: of what is free); the limit."""
    import torch

    from upshift.measure.samples import memory_free

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = min(limit, free) if limit is not None else free
        torch.cuda.set_per_process_memory_fraction(min(limit * HEADROOM / total, 1.0), device)
        return limit
    limit = limit if limit is not None else memory_free()
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = max(int(min(limit * HEADROOM, limit - BESIDE)), 0)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed if hard < 0 else min(allowed, hard), hard))
    return limit


def peak(device: torch.device) -> int | None:
    """The most bytes this process has held on `device`; None where the system does not say."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _try(job: Job, request: Request, device: torch.device, report: Report) -> None:
    from upshift.engine.group import Group
    from upshift.engine.parts import Parts
    from upshift.engine.settings import Execution

    job = job.set(train_data=opened(job.train_data), eval_data=opened(job.eval_data))
    report.where = "building model and optimizer"
    settings = Execution(plan=request.plan, device=str(device), micro_batch=request.size)
    parts = Parts(job, settings, Group(device), lambda kind, name, text: None)
    try:
        report.batch_norm = batch_norm(parts.model)
        report.where = "reading the data"
        largest = heaviest(job.train_data, job.collate, seconds=request.scan_seconds, index=request.train_index)
        report.train_index = largest.index
        report.scanned = f"{largest.seen:,} of {largest.length:,}" if largest.length else f"the first {largest.seen:,}"
        batch = moved(largest.batch(request.size), device)
        real = next(iter(parts.data.epoch(0)))
        evaluation = None
        if job.eval_data is not None:
            other = heaviest(job.eval_data, job.collate, seconds=request.scan_seconds, index=request.eval_index)
            report.eval_index = other.index
            evaluation = other.batch(min(job.eval_batch or min(job.global_batch, 1024), other.length or 1024))
        parts_of = [part.batch for part in real.parts[:REAL]]
        report.seconds = _Trial(parts, device).train(batch, parts_of, request, evaluation, report)
    finally:
        parts.close()


def batch_norm(model: torch.nn.Module) -> str:
    """The first layer whose statistics are those of a micro-batch; empty where there is none."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.track_running_stats):
            return f"{name}: {type(layer).__name__}"
    return ""


class _Trial:
    def __init__(self, parts: Parts, device: torch.device) -> None:
        self.parts, self.device = parts, device
        self.optimizer = parts.optimizer
        self.forward: Callable[[Any], tuple[Any, Any]] | None = None
        self.before: tuple[Callable[[Any], None], ...] | None = None

    def train(self, batch: Any, real: list[Any], request: Request, evaluation: Any, report: Report) -> float:
        """The steps and the evaluation; seconds of an update of the whole share."""
        passes = -(-request.share // request.size)
        self.mode(True)
        for number in range(1, STEPS + 1):
            for part in range(min(passes, 2)):
                report.where = f"pass {part + 1} of update {number}"
                self.backward(batch)
            if number == STEPS - 1:
                self.mixed(real)
            if number == STEPS:
                took = self.timed(lambda: self.backward(batch))
            report.where = f"the optimizer's step of update {number}"
            began = self.now()
            self.update()
            stepped = self.now() - began
            if number == STEPS - 1 and evaluation is not None:
                report.where = "the evaluation batch, which the micro-batch does not change (eval_batch does)"
                self.evaluate(evaluation)
        return passes * took + stepped

    def backward(self, batch: Any) -> None:
        if self.forward is None:
            self.parts.model_seen(batch)
            self.forward = self.parts.make_forward()
        output, target = self.forward(batch)
        loss = self.parts.loss(output, target)
        if isinstance(loss, Weighted):
            loss = loss.total / loss.count
        loss.backward()
        loss.item()  # as the loop reads it

    def mixed(self, real: list[Any]) -> None:
        began = self.now()
        for batch in real:
            self.backward(batch)
            if self.now() - began > REAL_SECONDS:
                return

    def update(self) -> None:
        parts, job = self.parts, self.parts.job
        if self.before is None:
            self.before = parts.optimizer_seen()
        for before in self.before:
            before(self.optimizer)
        if job.clip is not None:
            parts.group.clip_gradients(parts.parameters, job.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if parts.average is not None:
            parts.average.update()

    def evaluate(self, batch: Any) -> None:
        import torch

        assert self.forward is not None
        batch = moved(batch, self.device)
        self.mode(False)
        metrics = self.parts.new_metrics()
        with torch.no_grad():
            output, target = self.forward(batch)
            if self.parts.job.loss is not None:
                self.parts.loss(output, target)
            metrics.update(output, target, 1)
        self.mode(True)

    def mode(self, training: bool) -> None:
        self.parts.model.train(training)
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if callable(switch):
            switch()

    def timed(self, act: Callable[[], None]) -> float:
        """Median seconds."""
        found: list[float] = []
        while len(found) < 2 or (sum(found) < TIMED and len(found) < MOST_TIMED):
            began = self.now()
            act()
            found.append(self.now() - began)
        return statistics.median(found)

    def now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    """Read the request from the command line, write the report."""
    request = msgspec.json.decode(sys.argv[1], type=Request)
    Path(request.report).write_bytes(msgspec.json.encode(run(request)))


if __name__ == "__main__":
    main()
