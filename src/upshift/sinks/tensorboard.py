"""TensorBoard event files: https://github.com/tensorflow/tensorboard, `tensorboard/compat/proto/event.proto`.

Written record by record through the package's own writer, so that neither torch nor TensorFlow is imported and an error
of the disk is seen at once. Values are stored as float32, as TensorBoard does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upshift._optional import require
from upshift.sinks.feed import Began
from upshift.sinks.following import Closing, Note, Point
from upshift.sinks.texts import about

#: Ends the names of files written here: they are copies of the record, so a new one replaces them.
SUFFIX = ".upshift"

_WHY = "the tracker tensorboard"
#: `DT_STRING` of `types.proto`.
_STRING = 7
_FLOAT32 = 3.4028234663852886e38


class TensorBoard:
    """Writes one event file below `folder`. A second training in the same run folder writes it anew, from the start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None
        self._event: Any = None
        self._summary: Any = None
        self._tensor: Any = None

    def begin(self, began: Began, folder: Path) -> None:
        """Open the event file.

        Raises:
            MissingExtraError: no tensorboard here.
            OSError: the folder cannot be written.
        """
        writer = require("tensorboard.summary.writer.record_writer", extra="tensorboard", why=_WHY)
        self._event = require("tensorboard.compat.proto.event_pb2", extra="tensorboard", why=_WHY).Event
        self._summary = require("tensorboard.compat.proto.summary_pb2", extra="tensorboard", why=_WHY)
        self._tensor = require("tensorboard.compat.proto.tensor_pb2", extra="tensorboard", why=_WHY).TensorProto
        clock = began.clock or 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink(missing_ok=True)
        name = f"events.out.tfevents.{int(clock):010d}.{socket.gethostname()}.{os.getpid()}.0{SUFFIX}"
        self._file = writer.RecordWriter((self.folder / name).open("wb"))
        self._write(wall_time=clock, file_version="brain.Event:2")
        self._text("run", "\n".join(f"{key}: {value}" for key, value in about(began, folder).items()), 0, clock)
        self._file.flush()

    def add(self, points: Sequence[Point], notes: Sequence[Note]) -> None:
        """Raises:
        OSError: the disk is full.
        """
        for point in points:
            values = [
                self._summary.Summary.Value(tag=name, simple_value=value)
                for name, value in point.values.items()
                if abs(value) <= _FLOAT32
            ]
            self._write(wall_time=point.wall, step=point.step, summary=self._summary.Summary(value=values))
        for note in notes:
            self._text("events", f"{note.kind}: {note.text}", note.step, note.wall)
        self._file.flush()

    def end(self, closing: Closing) -> None:
        """Say how it ended, name report and checkpoints, close the file."""
        lines = [f"end: {closing.ended.how or closing.ended.code}" if closing.ended else "no end was recorded"]
        lines += [f"report: {closing.report}"] if closing.report else []
        lines += [f"checkpoint: {path}" for path in closing.checkpoints]
        try:
            self._text("end", "\n".join(lines), closing.step, closing.wall)
        finally:
            self._file.close()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(**fields).SerializeToString())

    def _text(self, tag: str, text: str, step: int, wall: float) -> None:
        # Indented, it is shown as it is and not as Markdown.
        shown = "\n".join(f"    {line}" for line in text.splitlines())
        value = self._summary.Summary.Value(
            tag=f"upshift/{tag}",
            metadata=self._summary.SummaryMetadata(
                plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text")
            ),
            tensor=self._tensor(dtype=_STRING, string_val=[shown.encode("utf-8", "replace")], tensor_shape={}),
        )
        self._write(wall_time=wall, step=step, summary=self._summary.Summary(value=[value]))
