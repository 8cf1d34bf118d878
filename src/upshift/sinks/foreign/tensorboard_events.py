"""TensorBoard event files, as TensorBoard, Keras, Lightning and others write them.

Records are taken from the files by TensorBoard's own reader, which checks their sums. Both kinds of scalar are read:
the plain value, and the tensor of the `scalars` plugin. Sizes that a tensor claims are never allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upshift._optional import require
from upshift.errors import RecordError
from upshift.records.run import Run
from upshift.sinks.foreign.series import Found, to_run

#: Folders of one training that Keras and others keep apart.
PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "eval", "evaluation"))

MOST_FILES = 1000

#: `DataType` of `types.proto` -> the field that holds a scalar, and its form in raw bytes.
_TYPES = {
    1: ("float_val", "<f"), 2: ("double_val", "<d"), 3: ("int_val", "<i"), 9: ("int64_val", "<q"),
    19: ("half_val", "<e"),
}  # fmt: skip


def read(path: Path) -> Run:
    """The training whose event files lie in the folder `path`, or in the file `path`.

    Files of subfolders belong to it where the folder itself has some, or where they are called `train`, `validation`
    and the like; their names then begin with that of the folder.

    Raises:
        RecordError: several trainings, or nothing that can be read.
        MissingExtraError: no tensorboard here.
    """
    files = _files(path)
    found = Found(source="TensorBoard event files", id=path.name if path.is_dir() else path.parent.name, script="")
    records = 0
    for prefix, file in files:
        scalars: dict[str, bool] = {}
        for event in _events(file, found):
            records += 1
            wall = float(event.wall_time)
            if event.HasField("file_version"):
                if 0 < wall < 4e9:
                    found.began = wall if found.began is None else min(found.began, wall)
                continue
            for value in event.summary.value:
                number = _number(value, scalars)
                if number is not None:
                    found.add(prefix + value.tag, int(event.step), wall, number)
    if not records:
        raise RecordError(f"{path} holds no event that can be read.", remedy="Name another folder.")
    found.script = found.id
    return to_run(found)


def _files(path: Path) -> list[tuple[str, Path]]:
    """(prefix of its names, file), in the order of their making."""
    if path.is_file():
        return [("", path)]
    own = [item for item in path.glob("*tfevents*") if item.is_file()]
    below: dict[str, list[Path]] = {}
    for item in path.glob("*/*tfevents*"):
        if item.is_file():
            below.setdefault(item.parent.name, []).append(item)
    if not own and len(below) > 1 and not set(below) <= PARTS:
        raise RecordError(
            f"{path} holds several trainings.", remedy=f"Name one of them: {', '.join(sorted(below)[:8])}."
        )
    alone = not own and len(below) == 1 and not set(below) <= PARTS
    found = [("", item) for item in own]
    for name, items in below.items():
        found += [("" if alone else f"{name}/", item) for item in items]
    # The name holds the second in which it was made.
    return sorted(found, key=lambda item: item[1].name)[:MOST_FILES]


def _events(file: Path, found: Found) -> Iterator[Any]:
    why = "reading TensorBoard event files"
    loader = require("tensorboard.backend.event_processing.event_file_loader", extra="tensorboard", why=why)
    proto = require("tensorboard.compat.proto.event_pb2", extra="tensorboard", why=why)
    message = require("google.protobuf.message", extra="tensorboard", why=why)
    try:
        for record in loader.RawEventFileLoader(str(file)).Load():
            try:
                yield proto.Event.FromString(record)
            except message.DecodeError:
                found.torn += 1
    except (OSError, ValueError, RuntimeError) as error:
        raise RecordError(f"{file} cannot be read: {error}.", remedy="Name another folder.") from None


def _number(value: Any, scalars: dict[str, bool]) -> float | None:
    """The scalar in a summary value; None where it is something else. Only the first of a name tells its kind."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor":
        return None
    if value.metadata.plugin_data.plugin_name:
        scalars[value.tag] = value.metadata.plugin_data.plugin_name == "scalars"
    if not scalars.get(value.tag) or value.tensor.dtype not in _TYPES:
        return None
    field, form = _TYPES[value.tensor.dtype]
    raw, numbers = value.tensor.tensor_content, getattr(value.tensor, field)
    if len(raw) == struct.calcsize(form):
        return float(struct.unpack(form, raw)[0])
    if len(numbers) != 1:
        return None
    if field == "half_val":
        return float(struct.unpack("<e", struct.pack("<H", numbers[0] & 0xFFFF))[0])
    return float(numbers[0])
