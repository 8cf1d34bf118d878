"""JSON for records: strict, with the place of a mistake in the error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from upshift.errors import RecordError

T = TypeVar("T")

#: A record larger than this is not one of ours.
MAX_BYTES = 256 * 2**20


def dumps(record: msgspec.Struct) -> bytes:
    """A record as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def loads(data: bytes, kind: type[T], *, source: str = "record") -> T:
    """Read a record back.

    Raises:
        RecordError: not JSON, not this kind of record, or from another schema version.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RecordError(
            f"{source} is not a readable {kind.__name__} record: {error}",
            remedy="It may come from another version of upshift, or have been cut short; write it anew.",
        ) from None


def write(path: Path, record: msgspec.Struct) -> None:
    """Write a record atomically (temporary file on the same filesystem, fsync, rename)."""
    write_bytes(path, dumps(record))


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, kind: type[T]) -> T:
    """Read a record from a file.

    Raises:
        RecordError: no such file, too large, or not readable as `kind`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than any record upshift writes.", remedy="Name another file.")
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    return loads(data, kind, source=str(path))
