"""The log format of LevelDB, as W&B's `.wandb` files have it: blocks of 32 KiB with records, or parts of records.

Source: https://github.com/google/leveldb/blob/main/doc/log_format.md; W&B puts seven bytes in front (which count as
part of the first block) and sums type and data with plain CRC-32. The package itself reads these files in a program of
its own, so there is nothing to call.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 15
#: Identifier, magic number, version.
START = struct.Struct("<4sHB")
IDENTIFIER, MAGIC, VERSION = b":W&B", 0xBEE1, 0
#: Sum, length, type: whole record, its first part, a middle one, its last.
HEADER = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4

#: A longer record is damage, or holds no numbers.
MOST_RECORD = 1 << 26


def is_log(path: Path) -> bool:
    """Whether the file begins like one.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(START.size)
    return len(start) == START.size and START.unpack(start) == (IDENTIFIER, MAGIC, VERSION)


def records(path: Path) -> Iterator[bytes | None]:
    """The records in order; None for each place that is damaged, after which the next block is read.

    Raises:
        OSError: the file cannot be read.
    """
    parts: list[bytes] | None = None
    with open(path, "rb") as file:
        skip = START.size
        while block := file.read(BLOCK):
            for kind, data in _parts(block, skip):
                if kind == WHOLE:
                    parts = None
                    yield data
                elif kind == FIRST:
                    parts = [data]
                elif kind in (MIDDLE, LAST) and parts is not None and sum(map(len, parts)) < MOST_RECORD:
                    parts.append(data)
                    if kind == LAST:
                        yield b"".join(parts)
                        parts = None
                else:
                    parts = None
                    yield None
            skip = 0
    if parts is not None:
        yield None


def _parts(block: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """Type and data of what lies in a block; type 0 for damage, which ends it."""
    while place + HEADER.size <= len(block):
        total, length, kind = HEADER.unpack_from(block, place)
        if not (total or length or kind):
            return  # room that was not used
        data = block[place + HEADER.size : place + HEADER.size + length]
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != total:
            yield 0, b""
            return
        yield kind, data
        place += HEADER.size + length
