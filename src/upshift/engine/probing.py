"""Finds the micro-batch of a job: `find_micro_batch("jobs.py:cifar", share=512)`; each size in a fresh process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from upshift.engine.microbatch import Found, Outcome, search
from upshift.engine.probe import Report, Request
from upshift.errors import ScriptFailedError
from upshift.records.plan import Setting

#: Seconds that one size may take.
PATIENCE = 600.0

#: Variables by which a process would take itself for one of several.
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def _silent(text: str) -> None:
    pass


def in_fresh_process(request: Request, patience: float = PATIENCE) -> Report:
    """Run `upshift.engine.probe` and read its report. A process that died without one did not fit: allocators and
    kernels below Python end the process where memory is refused to them."""
    environment = {key: value for key, value in os.environ.items() if key not in _RANKS}
    command = [sys.executable, "-m", "upshift.engine.probe", msgspec.json.encode(request).decode()]
    try:
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=patience,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Report(why=f"no answer within {patience:g} s")
    written = Path(request.report)
    if written.exists() and written.stat().st_size:
        return msgspec.json.decode(written.read_bytes(), type=Report)
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"exit code {ended.returncode}"
    return Report(why=f"its process died ({how})" + (f": {lines[-1]}" if lines else ""))


class Prober:
    """`probe(size)` for a job; remembers what the first process found out about the data.

    `limit` is known once a size was tried.
    """

    def __init__(self, request: Request, run: Callable[[Request], Report] = in_fresh_process,
                 say: Callable[[str], None] = _silent) -> None:  # fmt: skip
        """
        Args:
            request: the job and the limit; size and report are filled in. run: makes a process of it.
        """
        self.request, self._run, self._say = request, run, say
        self.limit = request.limit
        self._folder = tempfile.TemporaryDirectory(prefix="upshift-probe-")
        self._count = 0

    def __call__(self, size: int) -> Outcome:
        """Try this size.

        Raises:
            ScriptFailedError: the job fails for another reason than memory.
        """
        self._count += 1
        report = str(Path(self._folder.name) / f"{self._count}.json")
        found = self._run(msgspec.structs.replace(self.request, size=size, report=report))
        if found.error:
            raise ScriptFailedError(
                f"{self.request.reference} fails with a micro-batch of {size}: {found.error}",
                remedy="It is not memory; correct the job.",
            )
        if found.scanned and self.limit != found.limit:
            self._say(f"largest sample: looked at {found.scanned} samples")
        self.limit = found.limit if found.limit is not None else self.limit
        self.request = msgspec.structs.replace(
            self.request, train_index=_first(self.request.train_index, found.train_index),
            eval_index=_first(self.request.eval_index, found.eval_index), limit=self.limit,
        )  # fmt: skip
        return Outcome(found.fits, found.peak_bytes, found.seconds, found.why, found.batch_norm)

    def close(self) -> None:
        """Drop the reports."""
        self._folder.cleanup()


def _first(known: int | None, found: int | None) -> int | None:
    return known if known is not None else found


def find_micro_batch(reference: str, share: int, *, limit: int | None = None, device: str = "", exact: bool = False,
                     settings: Mapping[str, str] | None = None,
                     plan: Mapping[str, dict[str, Setting]] | None = None,
                     say: Callable[[str], None] = _silent) -> Found:  # fmt: skip
    """The fastest micro-batch that fits, and the largest; see `upshift.engine.microbatch`.

    Args:
        reference: `jobs.py:NAME`. share: samples of one rank in a global batch. limit: bytes, on the accelerator where
            it trains on one; None: what is free when the first size is tried. device: `cpu`, `cuda`; empty: an
            accelerator where there is one. settings: values for `--set`. plan: techniques and their settings.
        exact, say: see `upshift.engine.microbatch.search`.

    Raises:
        TrainingError, UsageError: see `search`. ScriptFailedError: the job fails for another reason.
    """
    request = Request(
        reference=reference, size=1, share=share, report="", limit=limit, device=device, settings=dict(settings or {}),
        plan=dict(plan or {}),
    )  # fmt: skip
    prober = Prober(request, say=say)
    try:
        found = search(prober, share, limit=limit, exact=exact, say=say)
    finally:
        prober.close()
    if found.warning:
        say(found.warning)
    return dataclasses.replace(found, limit=prober.limit)
