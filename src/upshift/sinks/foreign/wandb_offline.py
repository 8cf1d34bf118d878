"""Weights & Biases runs on the disk: `wandb/offline-run-…/run-ID.wandb`, whether or not they were ever sent.

The messages are the package's protocol buffers, in a `block_log`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upshift._optional import require
from upshift.errors import RecordError
from upshift.measure.metrics import flat
from upshift.records.run import Run
from upshift.sinks.foreign import block_log
from upshift.sinks.foreign.series import Found, Status, to_run

#: Names under which trainings log the number of updates, besides W&B's own count of rows.
STEPS = ("step", "global_step", "trainer/global_step", "train/global_step")

_WHY = "reading a W&B run"


def read(path: Path) -> Run:
    """The run in the folder `path`, or in the file `path`.

    Raises:
        RecordError: several runs, or nothing that can be read.
        MissingExtraError: no wandb here.
    """
    file = _file(path)
    found = Found(source="Weights & Biases", id=file.stem.removeprefix("run-"), script="")
    history = records = 0
    for record in _records(file, found):
        records += 1
        kind = record.WhichOneof("record_type")
        if kind == "run":
            seconds = record.run.start_time.seconds + record.run.start_time.nanos / 1e9
            found.began = seconds if 0 < seconds < 4e9 else found.began
            found.script = record.run.display_name or found.script
            found.id = record.run.display_name or record.run.run_id or found.id
            if record.run.host:
                found.environment["host"] = record.run.host
        elif kind == "history":
            _row(record.history, history, found)
            history += 1
        elif kind == "exit":
            found.exit_code = int(record.exit.exit_code)
            found.status = _status(found.exit_code)
            if found.began is not None and record.exit.runtime > 0:
                found.ended = found.began + float(record.exit.runtime)
    if not records:
        raise RecordError(f"{file} holds nothing that can be read.", remedy="Name another W&B run.")
    found.script = found.script or found.id
    return to_run(found)


def _status(code: int) -> Status:
    return "finished" if code == 0 else "interrupted" if code in (130, 255) else "failed"


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("run-*.wandb"))
    if len(files) != 1:
        raise RecordError(
            f"{path} holds {len(files)} W&B runs.",
            remedy=f"Name one of them: {', '.join(item.name for item in files[:8])}.",
        )
    return files[0]


def _records(file: Path, found: Found) -> Iterator[Any]:
    proto = require("wandb.proto.wandb_internal_pb2", extra="wandb", why=_WHY)
    message = require("google.protobuf.message", extra="wandb", why=_WHY)
    try:
        if not block_log.is_log(file):
            raise RecordError(f"{file} is no record of W&B.", remedy="Name another run.")
        for data in block_log.records(file):
            try:
                if data is not None:
                    yield proto.Record.FromString(data)
                    continue
            except message.DecodeError:
                pass
            # A run that was killed ends within a record.
            found.torn += 1
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror or error}.", remedy="Name another run.") from None


def _row(history: Any, number: int, found: Found) -> None:
    values: dict[str, float] = {}
    # Pictures, tables and pages are objects with a type; their numbers are no metrics.
    media = {".".join(item.nested_key[:-1]) for item in history.item if item.nested_key[-1:] == ["_type"]}
    for item in history.item:
        name = item.key or ".".join(item.nested_key)
        try:
            value = json.loads(item.value_json)
        except (ValueError, RecursionError):
            found.torn += 1
            continue
        if not (isinstance(value, dict) and "_type" in value) and name.rpartition(".")[0] not in media - {""}:
            values.update(flat(value, name))
    wall = values.pop("_timestamp", 0.0)
    row = values.pop("_step", float(number))
    step = next((values[name] for name in STEPS if name in values), row)
    for name, value in values.items():
        if name not in STEPS and not name.startswith("_"):
            found.add(name, int(step) if 0 <= step < 2**53 else -1, wall, value)
