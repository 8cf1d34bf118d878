"""Named tensors as one safetensors file, hashed while it is written; read back with every bound checked first.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian length of the header, a JSON header
`{name: {"dtype", "shape", "data_offsets"}}`, then the bytes of the tensors without holes. The package's own writer
takes no digest, does not sync, and cannot be made to fail on purpose, so it is not used here; any reader of the
format reads these files. A dtype the format lacks (complex128) is written as U8 with a last axis of its bytes. Where
shards of larger tensors are in a file, its `__metadata__` says where they lie (`shards`).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from upshift.checkpoint import shards
from upshift.checkpoint.disk import Disk, Writer, fill
from upshift.checkpoint.shards import Box, Shape
from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: A larger header is refused: it bounds what a hostile file can make us allocate.
MAX_HEADER = 16 * 2**20

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_NAMES = {torch_name: name for name, torch_name in DTYPES.items()}
_SIZES = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BF16": 2, "C64": 8}

_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Natural]
    data_offsets: tuple[_Natural, _Natural]


def total(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes the tensors will take, without the header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def write(
    writer: Writer, tensors: dict[str, torch.Tensor], places: Mapping[str, tuple[Shape, Shape]] | None = None
) -> None:
    """Write tensors (any device, any strides) in the safetensors format; one at a time is copied to the host.

    `places`: of those that are shards, the shape of the whole and the offset in it.

    Raises:
        OSError: the file cannot be written.
    """
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are little-endian, this machine is not.", remedy="Use another machine.")
    header: dict[str, Any] = {}
    offset = 0
    if "__metadata__" in tensors:
        raise CheckpointError("a tensor cannot be called __metadata__.", remedy="Give it another name.")
    if places:
        header["__metadata__"] = {shards.KEY: shards.to_text(places)}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        dtype = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
        shape = list(tensor.shape) if dtype else [*tensor.shape, tensor.element_size()]
        header[name] = {"dtype": dtype or "U8", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{len(tensors):,} tensors are too many for one file.", remedy="Join small tensors.")
    writer.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        host = tensor.detach().to("cpu").contiguous()
        writer.write(_bytes(host))


class Contents:
    """The tensors of an open file, read one at a time, each with memory of its own on the host.

    `shards` maps the names of those that are shards to the shape of the whole and their block of it.
    """

    def __init__(self, disk: Disk, fd: int, dtypes: Mapping[str, str]) -> None:
        """
        Args:
            disk: reads.
            fd: a descriptor at the beginning of the file; it is not closed here.
            dtypes: name -> torch's name of a dtype the format lacks.

        Raises:
            CheckpointError: not this format, or a header that claims other bytes than there are; nothing was allocated.
            OSError: it cannot be read.
        """
        entries, notes = _header(disk, fd)
        text = _note(notes, shards.KEY)
        self._disk, self._fd, self._dtypes = disk, fd, dtypes
        self._start = os.lseek(fd, 0, os.SEEK_CUR)
        self._entries: dict[str, _Entry] = dict(sorted(entries.items(), key=lambda item: item[1].data_offsets))
        self.shards: dict[str, tuple[Shape, Box]] = {}
        if text:
            self.shards = shards.from_text(text, {name: self.kind(name)[1] for name in self._entries})

    @property
    def names(self) -> Iterable[str]:
        """What is in the file, in the order in which it is written there."""
        return self._entries.keys()

    def close(self) -> None:
        """Read no more: the number of the descriptor may soon be another file's."""
        self._fd = -1

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        first, last = self._entries[name].data_offsets
        return last - first

    def kind(self, name: str) -> tuple[torch.dtype, Shape]:
        """Dtype and shape of a tensor.

        Raises:
            CheckpointError: the file has no such tensor, or one of another dtype.
        """
        import torch

        if name not in self._entries:
            raise CheckpointError(f"there is no {name!r:.80} in it.")
        entry = self._entries[name]
        if name not in self._dtypes:
            return getattr(torch, DTYPES[entry.dtype]), tuple(entry.shape)
        dtype = getattr(torch, self._dtypes[name], None)
        if not isinstance(dtype, torch.dtype) or entry.dtype != "U8" or entry.shape[-1:] != [dtype.itemsize]:
            raise CheckpointError(f"{name!r:.80} is no {self._dtypes[name]!r:.40}.")
        return dtype, tuple(entry.shape[:-1])

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or its rows from the first to before the second index along its first axis.

        Raises:
            CheckpointError: the file has no such tensor, or ends early.
            OSError: it cannot be read.
        """
        import torch

        dtype, shape = self.kind(name)
        begin, end = self._entries[name].data_offsets
        if rows is not None and shape:
            row = (end - begin) // max(shape[0], 1)
            begin, end = begin + rows[0] * row, begin + rows[1] * row
            shape = (rows[1] - rows[0], *shape[1:])
        raw = torch.empty(end - begin, dtype=torch.uint8)
        os.lseek(self._fd, self._start + begin, os.SEEK_SET)
        if fill(self._disk, self._fd, _bytes(raw)) != raw.numel():
            raise CheckpointError("its tensors end early.")
        try:
            return raw.view(dtype).reshape(shape)
        except (RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{name!r:.80} has an impossible shape: {error!s:.80}.") from None


def rare_dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> dtype of the tensors whose dtype the format lacks."""
    found = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return {name: dtype for name, dtype in found.items() if dtype not in _NAMES}


def header_of(disk: Disk, fd: int) -> dict[str, Any]:
    """The checked header of an open file; the descriptor then stands at the first tensor.

    Every entry's bytes lie inside the file, fit its shape, and follow upon each other.

    Raises:
        CheckpointError: not so.
    """
    return _header(disk, fd)[0]


def _header(disk: Disk, fd: int) -> tuple[dict[str, _Entry], bytes]:
    """The entries, and what `__metadata__` holds, as JSON."""
    size = os.fstat(fd).st_size
    start = bytearray(8)
    if fill(disk, fd, memoryview(start)) < 8 or not 2 <= (length := int.from_bytes(start, "little")) <= size - 8:
        raise CheckpointError("it is no safetensors file.")
    if length > MAX_HEADER:
        raise CheckpointError(f"its header claims {length:,} bytes, more than {MAX_HEADER:,}.")
    text = bytearray(length)
    fill(disk, fd, memoryview(text))
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        notes = bytes(raw.pop("__metadata__", msgspec.Raw(b"null")))
        entries = {name: msgspec.json.decode(item, type=_Entry) for name, item in raw.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"its header cannot be read: {error!s:.200}.") from None
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{name!r:.80} has the unknown dtype {entry.dtype!r:.40}.")
        # Cut off before a product of many huge sizes takes long to multiply.
        if len(entry.shape) > 64 or begin != expected or math.prod(entry.shape) * _size(entry.dtype) != end - begin:
            raise CheckpointError(f"{name!r:.80} does not fit its place in the file.")
        expected = end
    if expected != size - 8 - length:
        raise CheckpointError(f"its header claims {expected:,} bytes of tensors; there are {size - 8 - length:,}.")
    return entries, notes


def _note(notes: bytes, key: str) -> str:
    """A text of `__metadata__`; empty where there is none."""
    try:
        found = msgspec.json.decode(notes, type=dict[str, Any] | None) or {}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"its header cannot be read: {error!s:.200}.") from None
    text = found.get(key, "")
    return text if isinstance(text, str) else ""


def _size(dtype: str) -> int:
    return _SIZES.get(dtype) or int(dtype[1:]) // 8


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, bytes, writable, for as long as the tensor lives."""
    import ctypes

    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))
