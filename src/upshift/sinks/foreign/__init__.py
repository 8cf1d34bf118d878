"""Runs that were recorded elsewhere, read as a `Run`: TensorBoard events, Weights & Biases offline, MLflow.

Each reader is a file of its own; what is common is in `series.py`. Nothing is written, and nothing fetched.
"""

from __future__ import annotations

from pathlib import Path

from upshift.errors import RecordError
from upshift.records.run import Run
from upshift.records.runlog import LOG

KINDS = ("tensorboard", "wandb", "mlflow")


def detect(path: Path | str) -> str:
    """Whose record lies at `path`: one of `KINDS`; empty where it is none of these, or one of ours.

    `path` is a folder or a file; for MLflow also `FILE.db#RUN`, `FOLDER#RUN` and `sqlite:///FILE.db#RUN`.
    """
    from upshift.sinks.foreign import mlflow_runs

    place, run = mlflow_runs.split(path)
    try:
        if any(next(place.glob(pattern), None) is not None for pattern in (LOG, f"*/{LOG}")):
            return ""
        if mlflow_runs.is_store(place):
            return "mlflow"
        if run:
            return ""
        if place.is_file():
            if "tfevents" in place.name:
                return "tensorboard"
            return "wandb" if place.name.startswith("run-") and place.suffix == ".wandb" else ""
        if any(place.glob("run-*.wandb")):
            return "wandb"
        for pattern in ("*tfevents*", "*/*tfevents*"):
            if any(item.is_file() for item in place.glob(pattern)):
                return "tensorboard"
    except OSError:
        pass
    return ""


def read(path: Path | str) -> Run:
    """The run at `path`; see `detect`. What the record does not tell is unknown in the run.

    Raises:
        RecordError: no such record, a damaged one, or several runs of which none is named.
        MissingExtraError: its package is needed to read it, and is not installed.
    """
    kind = detect(path)
    if kind == "tensorboard":
        from upshift.sinks.foreign import tensorboard_events

        return tensorboard_events.read(Path(path))
    if kind == "wandb":
        from upshift.sinks.foreign import wandb_offline

        return wandb_offline.read(Path(path))
    if kind == "mlflow":
        from upshift.sinks.foreign import mlflow_runs

        return mlflow_runs.read(path)
    raise RecordError(
        f"{path} is no run that can be read.",
        remedy="Name a run folder, TensorBoard event files, a W&B offline-run folder, or MLFLOW.db#RUN.",
    )
