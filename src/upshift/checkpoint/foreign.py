"""Weights of other programs: read from .pt, .safetensors and DCP folders, written to each with plain torch keys.

A .pt file is a pickle. It is looked through first (`opcodes`), so that one that would call anything but the functions
that rebuild tensors, or claims more bytes than it has, is refused before torch sees it; then `torch.load` reads it with
`weights_only=True`. There is no fall-back: `trust_pickle` is the caller's word for one file in one call.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.checkpoint import tensors as files
from upshift.checkpoint.disk import Disk, opened
from upshift.checkpoint.opcodes import MAX_BYTES, Named, look
from upshift.checkpoint.tree import reach
from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

_TRUST = "If you trust where it comes from, load it with trust_pickle, for this file only; or save plain weights anew."
_REBUILDS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_HARMLESS = {"collections.OrderedDict", "torch.Size", "torch._utils._rebuild_parameter", "torch.device", "persistent"}
_NAME_WEIGHTS = "Name weights: a .safetensors or .pt file, or a folder written by torch.distributed.checkpoint."


def load_weights(path: Path, *, key: str | None = None, trust_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Weights by their torch keys, on the host.

    Args:
        path: a .safetensors file, a .pt file (any suffix torch.save is used with), or a DCP folder.
        key: of a file that holds more than weights, the entry that holds them ("model", "state_dict"); of a DCP folder
            the first part of the names ("model" of "model.0.weight").
        trust_pickle: let a .pt file run the code it names. Only for a file you made yourself.

    Raises:
        CheckpointError: not weights, damaged, or not safe to load.
    """
    path = Path(path)
    try:
        if path.is_dir():
            from upshift.checkpoint import dcp

            found: Any = dcp.read(path)
            return _under(found, key) if key else found
        if path.suffix == ".safetensors":
            found = _safetensors(path)
        else:
            found = _pt(path, trust_pickle)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", remedy=_NAME_WEIGHTS) from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not loaded: {error.message}", remedy=error.remedy or _NAME_WEIGHTS) from None
    return _chosen(found, key, path)


def save_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write weights with the keys they have: .safetensors, .pt (.pth, .bin, .ckpt), or, without suffix, a DCP folder.

    Written beside the target and renamed: the file that was there stays until the new one is whole. Tied weights stay
    tied in .pt; the other formats hold each under its own key.

    Raises:
        CheckpointError: the suffix is none of these, or it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (*SUFFIXES, ""):
        raise CheckpointError(
            f"{path} has the unknown suffix {path.suffix}.", remedy="Name FILE.safetensors or FILE.pt."
        )
    if path.suffix == "" and path.exists():
        raise CheckpointError(f"{path} is there already.", remedy="Name another folder.")
    plain = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, path.suffix, plain)
        os.replace(temporary, path)
        Disk().sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}.", remedy="Free some space, or name another place."
        ) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _write(temporary: Path, suffix: str, plain: dict[str, torch.Tensor]) -> None:
    import torch

    if suffix == "":
        from upshift.checkpoint import dcp

        dcp.write(temporary, plain)
        return
    # Made first, so that others cannot read it while it is written.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in plain.items()}
        save_file(apart, temporary, metadata={"format": "pt"})
    else:
        torch.save(plain, temporary)
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = path.resolve()  # a hub's cache consists of links
    with opened(path.parent, path.name) as fd:
        files.header_of(Disk(), fd)
    return dict(load_file(path))


def _pt(path: Path, trust_pickle: bool) -> Any:
    import torch

    if not trust_pickle:
        with open(path, "rb") as file:
            check_pt(file)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # whatever the code of a trusted pickle raises, too
        lines = str(error).splitlines() or [type(error).__name__]
        # torch explains at length, and recommends to trust the file.
        text = lines[0].partition(". In PyTorch")[0]
        raise CheckpointError(f"torch cannot load it: {text:.200}.", remedy=_TRUST) from None


def check_pt(file: Any) -> None:
    """Look through a file of torch.save, open for reading: only tensors, and only as many bytes as there are.

    Raises:
        CheckpointError: it would call something else, is compressed, or claims more than it holds.
    """
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise CheckpointError(
            "it is no archive of torch.save (or one of torch before 1.6).", remedy="Save it anew with a current torch."
        ) from None
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    entries = {entry.filename: entry for entry in archive.infolist()}
    inside = sum(entry.file_size for entry in entries.values())
    stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries.values())
    if len(entries) != len(archive.infolist()) or not stored or inside > size:
        raise CheckpointError(f"its archive is compressed or claims {inside:,} bytes of {size:,}.")
    index = [entry for name, entry in entries.items() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(index) != 1 or index[0].file_size > MAX_BYTES:
        raise CheckpointError("its archive has no index of a bearable size.")
    sizes = {name.partition("/")[2]: entry.file_size for name, entry in entries.items()}
    try:
        data = archive.read(index[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"its archive is damaged: {error!s:.120}.") from None
    for call in look(data)[1]:
        try:
            _check_call(call, sizes)
        except (ValueError, TypeError, IndexError, AttributeError):
            raise CheckpointError(f"its call of {call.name!s:.80} is not as torch writes it.", remedy=_TRUST) from None


def _check_call(call: Named, sizes: dict[str, int]) -> None:
    args = call.args or ()
    if call.args is None:
        if call.name not in _REBUILDS | _HARMLESS and not _is_dtype(call.name):
            raise CheckpointError(f"loading it would use {call.name!s:.120}.", remedy=_TRUST)
    elif call.name == "persistent":
        _storage_bytes(call, sizes)
    elif call.name in _REBUILDS:
        storage, offset, shape, stride = args[:4]
        size, room = _storage_bytes(storage, sizes)
        if call.name.endswith("_v3"):  # bytes, and a dtype of their own
            size = _itemsize(args[6])
        if not isinstance(offset, int) or offset < 0 or (offset + reach(_ints(shape), _ints(stride))) * size > room:
            raise CheckpointError(f"a tensor of shape {_ints(shape)} reaches beyond the {room:,} bytes it has.")
    elif call.name not in _HARMLESS:
        raise CheckpointError(f"loading it would call {call.name!s:.120}.", remedy=_TRUST)


def _is_dtype(name: str) -> bool:
    """Whether a global is one of torch's dtypes or kinds of storage."""
    import torch

    short = name.removeprefix("torch.")
    return short in _ELEMENT or (name.startswith("torch.") and isinstance(getattr(torch, short, None), torch.dtype))


def _storage_bytes(storage: Any, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes of an element and of the whole storage that a persistent id names, checked against the archive."""
    try:
        word, kind, key, _, numel = storage.args
        size = _ELEMENT[kind.name.removeprefix("torch.")]
        room = sizes[f"data/{key}"]
        if word != "storage" or not isinstance(numel, int) or not 0 <= numel * size <= room:
            raise CheckpointError(f"a storage claims {numel} elements; there are {room:,} bytes.")
        return size, numel * size
    except (AttributeError, TypeError, ValueError, KeyError):
        raise CheckpointError("one of its storages is not as torch writes them.", remedy=_TRUST) from None


def _itemsize(dtype: Any) -> int:
    import torch

    found = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Named) else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError("one of its tensors has no dtype.", remedy=_TRUST)
    return found.itemsize


def _ints(shape: Any) -> list[int]:
    items = shape.args[0] if isinstance(shape, Named) and shape.args else shape
    return list(items) if isinstance(items, (tuple, list)) else [-1]


_ELEMENT = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "storage.UntypedStorage": 1, "UntypedStorage": 1,
}  # fmt: skip


def _under(found: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    part = {name.removeprefix(f"{key}."): item for name, item in found.items() if name.startswith(f"{key}.")}
    if not part:
        raise CheckpointError(f"no name there begins with {key!r}.", remedy=f"Names: {', '.join(list(found)[:8])}.")
    return part


def _chosen(found: Any, key: str | None, path: Path) -> dict[str, torch.Tensor]:
    """The entry of a loaded file that is a flat dict of tensors."""
    import torch

    def weights(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(isinstance(i, torch.Tensor) for i in value.values())

    if key is not None:
        found = found.get(key) if isinstance(found, Mapping) else None
    if weights(found):
        return {str(name): tensor.detach() for name, tensor in found.items()}
    inner = [str(name) for name, value in found.items() if weights(value)] if isinstance(found, Mapping) else []
    raise CheckpointError(
        f"{path} holds no weights{f' under {key!r}' if key else ''} (a dict of tensors).",
        remedy=f"Name one of its entries with key=: {', '.join(inner)}." if inner else _NAME_WEIGHTS,
    )
