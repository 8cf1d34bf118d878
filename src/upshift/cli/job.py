"""`python -m upshift.cli.job jobs.py:NAME [--set KEY=VALUE]`: trains a declared job, as a script of its own.

`upshift run` and launchers start it with a spec in the environment; `diagnose`, `tune` and `verify` start it as they
start any script. Metrics are printed on stdout, a line an evaluation; everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from upshift.api.jobs import SPEC, JobSpec, owned, parse_settings
from upshift.cli.show import safe
from upshift.errors import UpshiftError, UsageError
from upshift.hook.boot import OUTSIDE

#: Updates of the whole job. What watches a script reads it here, as it does in any script that has such a name.
total_steps: int | None = None


def main() -> int:
    """Train; returns the exit code."""
    from upshift.engine.reference import load_job
    from upshift.engine.run import train_job

    if len(sys.argv) < 2:
        raise UsageError("no job was named.", remedy="python -m upshift.cli.job jobs.py:NAME")
    reference = sys.argv[1]
    spec = _spec()
    job = load_job(reference, {**spec.settings, **parse_settings(tuple(sys.argv[2:]))})
    first = int(os.environ.get("RANK", "0") or 0) == 0
    bar = Bar(job, quiet=spec.quiet or not first)
    settings = _execution(spec, reference, bar)
    try:
        result = train_job(job, settings, json.loads(os.environ.pop(OUTSIDE, "{}")))
    finally:
        bar.close()
    if first:
        folder = f"; {result.folder}" if result.folder is not None else ""
        bar.say(f"{result.steps:,} steps, {result.samples:,} samples in {result.seconds:.1f} s{folder}")
        if result.how:
            bar.say(f"{result.how}; the same command goes on from there")
        elif job.target is not None and not result.reached:
            bar.say(f"the target was not reached: {job.target.metric} {job.target.value:g}")
    return result.code


def _spec() -> JobSpec:
    text = os.environ.get(SPEC, "")
    if not text:
        return JobSpec()
    try:
        return msgspec.json.decode(text.encode(), type=JobSpec)
    except msgspec.DecodeError as error:
        raise UsageError(f"{SPEC} cannot be read: {error}", remedy="Unset it, or start with upshift run.") from None


def _execution(spec: JobSpec, reference: str, bar: Bar) -> Any:
    from upshift.engine.settings import Execution, extended

    return extended(
        Execution, spec, out=Path(spec.out) if spec.out else None, plan=spec.plan, plan_file=spec.plan_file,
        reference=reference, process_ends=True, environment=dict(spec.environment),
        owned=lambda out: owned(spec, out, bar.say), say=bar.say, metrics=bar.metrics,
        progress=bar.show if bar.live else None, planned=_plans,
    )  # fmt: skip


def _plans(steps: int | None) -> None:
    global total_steps
    total_steps = steps


class Bar:
    """A progress bar on a terminal, lines elsewhere."""

    def __init__(self, job: Any, *, quiet: bool) -> None:
        self.quiet = quiet
        self.live = not quiet and sys.stderr.isatty()
        self._job = job
        self._bar: Any = None
        self._task: Any = None
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """One line on stderr."""
        if self.quiet:
            return
        line = f"upshift: {safe(text)}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def metrics(self, step: int, epoch: int, found: dict[str, float]) -> None:
        """One line on stdout."""
        values = " ".join(f"{name}: {value:.6g}" for name, value in found.items())
        print(f"epoch: {epoch} step: {step} {values}", flush=True)

    def show(self, report: dict[str, float]) -> None:
        """Where the training is."""
        if self._bar is None:
            self._start()
        speed = report["trained"] / max(report["seconds"], 1e-9)
        told = f"loss {report['loss']:.4g}  {speed:,.0f} samples/s"
        for name in self._job.metrics:
            if name in report:
                told += f"  {name} {report[name]:.4g}"
        self._bar.update(self._task, completed=report["step"], total=report.get("steps"), description=told)
        self._bar.refresh()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=Console(stderr=True), auto_refresh=False, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def entry() -> int:
    """`main`, with errors as a sentence and a remedy."""
    try:
        return main()
    except UpshiftError as error:
        print(f"upshift: {safe(error.message)}", file=sys.stderr)
        if error.remedy:
            print(f"         {safe(error.remedy)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("upshift: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(entry())
