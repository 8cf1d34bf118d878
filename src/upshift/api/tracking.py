"""Trackers: checked before a run, sent to after it; and runs that were recorded elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upshift.api.target import Say
from upshift.errors import RecordError
from upshift.records import Run
from upshift.records.runfold import fold


def check_trackers(specs: Sequence[str]) -> list[str]:
    """Trackers such as `tensorboard:DIR` with whole paths, as the process beside the run needs them.

    Raises:
        UsageError: an unknown tracker, or a place that cannot be written.
        MissingExtraError: a tracker's package is not installed.
    """
    from upshift.sinks import trackers

    return trackers.check(specs)


def send(folder: Path, specs: Sequence[str], say: Say) -> list[str]:
    """Hand a recorded run to trackers, as if they had followed it. Returns the names of those that failed.

    Raises:
        UsageError, MissingExtraError: see `check_trackers`.
        RecordError: no run in `folder`.
    """
    from upshift.sinks import trackers

    specs = trackers.check(specs)
    fold(folder)
    failed = []
    for sink in trackers.open_sinks(specs, folder.absolute()):
        try:
            sink.poll()
            sink.close()
        except Exception as error:
            # A server that is away, a full disk: the others are still served.
            failed.append(sink.name)
            say(f"{sink.name} failed: {error}")
        else:
            say(f"sent to {sink.name}")
    return failed


def load_foreign(path: Path | str) -> Run | None:
    """A run recorded by TensorBoard, Weights & Biases or MLflow; None where `path` is none of these.

    Raises:
        RecordError: damaged, or several runs of which none is named.
        MissingExtraError: its package is needed to read it, and is not installed.
    """
    from upshift.sinks import foreign

    return foreign.read(path) if foreign.detect(path) else None


def load_any(path: Path | str) -> Run:
    """A run of upshift, or one recorded elsewhere.

    Raises:
        RecordError: neither.
        MissingExtraError: its package is needed to read it, and is not installed.
    """
    found = load_foreign(path)
    if found is not None:
        return found
    if not Path(path).is_dir():
        raise RecordError(f"{path} is no run that can be read.", remedy="Name a run folder, or a run of a tracker.")
    return fold(Path(path))
