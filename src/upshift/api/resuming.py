"""Does a job resume exactly? It is stopped at random steps and gone on with, and compared with a run that was not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from upshift.api.jobs import SPEC, JobSpec
from upshift.api.target import ENTRY, Say, Target
from upshift.errors import ScriptFailedError, UsageError

#: Exit code of a run that was asked to stop.
STOPPED = 143


@dataclass
class ResumeOptions:
    """`steps`: length of the runs that are compared; `times`: interruptions, each at a step drawn at random."""

    steps: int = 40
    times: int = 3
    seed: int = 0
    workers: int | None = None
    processes: int = 1


@dataclass(frozen=True)
class Resumed:
    """What differed after going on from each of `stops`; nothing: the run is bit-exact."""

    steps: int
    stops: tuple[int, ...]
    differs: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every bit of the final state is the same."""
        return not self.differs


def verify_resume(target: Target, options: ResumeOptions, say: Say) -> Resumed:
    """Train `options.steps` updates at one go and once more with interruptions, and compare the final states.

    Compared are weights, optimizer, averages, schedule, random states, data position and results; not the time taken.

    Raises:
        UsageError: the target is no job.
        ScriptFailedError: the job failed, with the end of what it said.
    """
    from upshift.checkpoint.compare import differences
    from upshift.checkpoint.store import Store

    if not target.job or target.starts_others:
        raise UsageError("only a declared job can be resumed exactly.", remedy="upshift verify --resume jobs.py:NAME")
    target.check()
    draw = random.Random(options.seed)
    stops = sorted(draw.sample(range(1, options.steps), min(options.times, options.steps - 1)))
    states = []
    with tempfile.TemporaryDirectory(prefix="upshift-") as folder:
        for name, places in (("whole", []), ("stopped", stops)):
            out = Path(folder) / name
            for stop in places:
                say(f"training to step {stop}, then stopping")
                _train(target, options, out, stop)
            say(f"training to step {options.steps}" + (" from there" if places else " at one go"))
            _train(target, options, out, None)
            store = Store(out)
            newest = store.newest()
            if newest is None:
                raise ScriptFailedError(f"{target.job} left no checkpoint.", remedy="Run it by itself: upshift run.")
            state = store.load(newest)[0]
            state["progress"].pop("seconds", None)
            state["results"]["reached"].pop("seconds", None)
            states.append(state)
    return Resumed(options.steps, tuple(stops), tuple(differences(*states)))


def _train(target: Target, options: ResumeOptions, out: Path, stop: int | None) -> None:
    settings = {"steps": str(options.steps)}
    spec = JobSpec(
        out=str(out), settings=settings, stop_at=stop, save_seconds=1e9, quiet=True,
        loader={"num_workers": options.workers} if options.workers is not None else {},
    )  # fmt: skip
    command = [sys.executable, "-m", ENTRY]
    if options.processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                   str(options.processes), "-m", ENTRY]  # fmt: skip
    done = subprocess.run(
        [*command, target.job, *target.arguments], env={**os.environ, SPEC: msgspec.json.encode(spec).decode()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    stopped = stop is not None and (done.returncode == STOPPED or options.processes > 1)
    if done.returncode != 0 and not stopped:
        tail = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise ScriptFailedError(f"{target.job} failed (exit code {done.returncode}):\n{tail}", remedy="Mend the job.")
