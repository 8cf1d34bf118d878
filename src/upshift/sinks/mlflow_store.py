"""MLflow: a server, a database or a folder, through `mlflow.MlflowClient`, in batches.

Limits of a batch: https://mlflow.org/docs/latest/rest-api.html#log-batch
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from upshift._optional import require
from upshift.sinks.feed import Began
from upshift.sinks.following import Closing, Note, Point
from upshift.sinks.texts import about

EXPERIMENT = "upshift"

#: Numbers and texts that one call may carry, and characters of a value.
MOST_NUMBERS, MOST_TEXTS = 1000, 100
MOST_VALUE = 500

_KEPT_NOTES = 90
_NOT_A_KEY = re.compile(r"[^\w\-./ ]")


class MlflowStore:
    """Writes one MLflow run. A second training in the same run folder makes a new one, with everything in it."""

    def __init__(self, uri: str) -> None:
        """
        Args:
            uri: a tracking URI: `http://…`, `sqlite:///…`, `file:///…`.
        """
        self._uri = uri
        self._client: Any = None
        self._entities: Any = None
        self._run = ""
        self._notes = 0

    def begin(self, began: Began, folder: Path) -> None:
        """Create the run, in the experiment named by MLFLOW_EXPERIMENT_NAME, else `upshift`.

        Raises:
            MissingExtraError: no mlflow here.
        """

        if self._uri.startswith("file:"):
            # MLflow refuses folders unless it is told; whoever named one with runs in it has told so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        client = require("mlflow.tracking.client", extra="mlflow", why="the tracker mlflow")
        self._entities = require("mlflow.entities", extra="mlflow", why="the tracker mlflow")
        self._client = client.MlflowClient(tracking_uri=self._uri or None)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, _artifacts(self._uri))
        told = {key(name): value[:MOST_VALUE] for name, value in about(began, folder).items()}
        made = self._client.create_run(
            number,
            start_time=int(1000 * (began.clock or 0.0)) or None,
            run_name=folder.name,
            tags={
                "mlflow.source.name": began.script,
                "upshift.folder": str(folder),
                "upshift.techniques": ", ".join(began.techniques)[:MOST_VALUE] or "none",
            },
        )
        self._run = made.info.run_id
        parameters = [self._entities.Param(name, value) for name, value in told.items() if value]
        for batch in _batches(parameters, MOST_TEXTS):
            self._client.log_batch(self._run, params=batch)

    def add(self, points: Sequence[Point], notes: Sequence[Note]) -> None:
        """Numbers in batches; the first notes as tags, since MLflow has no place for a line of text at a step."""
        numbers = [
            self._entities.Metric(key(name), value, int(1000 * point.wall), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for batch in _batches(numbers, MOST_NUMBERS):
            self._client.log_batch(self._run, metrics=batch)
        kept = notes[: _KEPT_NOTES - self._notes]
        tags = [
            self._entities.RunTag(f"upshift.note.{self._notes + index:02d}", f"{note.kind}: {note.text}"[:MOST_VALUE])
            for index, note in enumerate(kept)
        ]
        self._notes += len(tags)
        for batch in _batches(tags, MOST_TEXTS):
            self._client.log_batch(self._run, tags=batch)

    def end(self, closing: Closing) -> None:
        """Report as artefact, checkpoints as paths in a tag, status and time of the end."""
        try:
            if closing.report is not None:
                self._client.log_artifact(self._run, str(closing.report))
            if closing.checkpoints:
                named = "\n".join(str(path) for path in reversed(closing.checkpoints))
                self._client.set_tag(self._run, "upshift.checkpoints", named[:5000])
        finally:
            code = closing.ended.code if closing.ended else None
            status = "FINISHED" if code == 0 else "KILLED" if closing.ended is None or code == 130 else "FAILED"
            self._client.set_terminated(self._run, status, end_time=int(1000 * closing.wall) or None)


def _artifacts(uri: str) -> str | None:
    """Where a new experiment keeps its files: beside its database, and not in the folder one happens to be in."""
    path = uri.removeprefix("sqlite:///")
    return (Path(path).parent / "mlartifacts").as_uri() if path != uri else None


def key(name: str) -> str:
    """A name as MLflow takes it: letters, digits, `_-./` and spaces, at most 250 characters, no path upwards."""
    kept = _NOT_A_KEY.sub("_", name.encode("ascii", "replace").decode())
    parts = [part if part.strip(".") else "_" for part in kept.split("/")]
    return "/".join(parts)[:250]


def _batches(items: Sequence[Any], most: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), most):
        yield list(items[first : first + most])
