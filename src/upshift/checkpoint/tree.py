"""A nested state as a JSON-able skeleton and a flat dict of tensors, and back. No pickle: the set of types is closed.

    {"model": {"weight": W}, "step": 3}  ->  {"dict": {"model": {"dict": {"weight": {"tensor": "model.weight"}}}, ...}}
                                             {"model.weight": W}

In the skeleton None, bool, str, finite floats and ints of 64 bits stand for themselves and a list is a list; every
other value is an object with one tag: `dict`, `pairs` (a dict with int keys), `state_dict` (an OrderedDict with the
versions of its modules), `tuple`, `int` (more than 64 bits), `float` (nan, inf), `text` (lone surrogates), `bytes`,
`tensor`, `view`, `spread` (a tensor whose shards are in the files of several ranks).

Tensors that share memory are written once. The same tensor under two names (tied weights) comes back as one tensor;
different views of one storage come back as views of one storage. Memory formats (channels_last) are kept.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from upshift.checkpoint.shards import Shape, Spread
from upshift.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

#: What a tensor of a state becomes when the state is put together: from its name and the strides to restore; from the
#: name and the shape of one that is spread over ranks.
Leaf = Callable[[str, "list[int] | None"], Any]
Whole = Callable[[str, Shape], Any]

#: Containers deeper than this are no state of a training.
MAX_DEPTH = 64

#: Values in a skeleton; the bound keeps what a hostile file can make us allocate below 200 MB.
MAX_VALUES = 500_000

_INT_BITS = 4096
_REMEDY = "A state may hold None, bool, int, float, str, bytes, tensors, and lists, tuples and dicts of these."
_BROKEN = "The file was not written by upshift, or by a later version of it."


def split(tree: Any, taken: Iterable[str] = ()) -> tuple[Any, Tensors]:
    """A state as (skeleton, tensors).

    Args:
        tree: None, bool, int, float, str, bytes, dense tensors, `Spread`, and lists, tuples and dicts (str or int keys)
            of them.
        taken: names that no tensor of the tree may get (those of shards).

    Returns:
        The skeleton, and name -> tensor. The tensors are those of the tree or views of them, detached, on their own
        devices, contiguous in the order of their elements unless they are not; nothing is copied.

    Raises:
        CheckpointError: another type, a key that is neither str nor int, or nesting beyond 64; the path is named.
    """
    return _Splitter(tree, taken).result()


def join(skeleton: Any, tensors: Tensors, *, leaf: Leaf | None = None, spread: Whole | None = None) -> Any:
    """The state that `split` took apart; tensors without gradient, on the device on which they were given.

    Args:
        skeleton, tensors: as `split` gave them.
        leaf: makes what stands in place of a tensor; views of shared memory are made from `tensors` in any case.
        spread: makes what stands in place of a tensor whose shards are elsewhere.

    Raises:
        CheckpointError: the skeleton is none, or names a tensor that is not there.
    """
    return _Joiner(tensors, leaf, spread).value(skeleton, 0)


class _Splitter:
    def __init__(self, tree: Any, taken: Iterable[str]) -> None:
        self._tree = tree
        self._taken = frozenset(taken)
        self._tensors: Tensors = {}
        self._places: dict[int, tuple[torch.Tensor, str]] = {}
        self._leaves: list[tuple[torch.Tensor, dict[str, Any], str]] = []
        self._values = 0
        self._open: set[int] = set()

    def result(self) -> tuple[Any, Tensors]:
        skeleton = self._value(self._tree, ())
        for group in self._by_storage():
            self._write(group)
        return skeleton, self._tensors

    def _value(self, value: Any, path: tuple[Any, ...]) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise CheckpointError(
                f"the state holds more than {MAX_VALUES:,} values, the last at {_said(path)}.",
                remedy="Keep long lists of numbers in a tensor.",
            )
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return _integer(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is str:
            return _text(value)
        if kind is bytes:
            return {"bytes": b64encode(value).decode()}
        if kind in (list, tuple, dict, OrderedDict):
            return self._container(value, path)
        if kind is Spread:
            return {"spread": value.name, "shape": list(value.shape)}
        return self._leaf(value, path)

    def _container(self, value: Any, path: tuple[Any, ...]) -> Any:
        if len(path) >= MAX_DEPTH or id(value) in self._open:
            raise CheckpointError(f"the state is nested too deeply at {_said(path[:4])}.", remedy=_REMEDY)
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return self._mapping(value, path)
            items = [self._value(item, (*path, i)) for i, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"the dict at {_said(path)} has a key of type {type(key).__name__}: {key!r:.60}.",
                    remedy="Keys are str or int.",
                )
        plain = all(type(key) is str and _text(key) is key for key in value)
        if not plain:
            return {"pairs": [[self._value(k, path), self._value(v, (*path, k))] for k, v in value.items()]}
        items = {key: self._value(item, (*path, key)) for key, item in value.items()}
        if type(value) is OrderedDict:
            # What torch's modules call `state_dict`; some (spectral norm) load wrongly without their version.
            versions = getattr(value, "_metadata", None)
            return {"state_dict": items, "versions": self._value(_plain(versions), (*path, "_metadata"))}
        return {"dict": items}

    def _leaf(self, value: Any, path: tuple[Any, ...]) -> Any:
        problem = _not_storable(value)
        if problem:
            raise CheckpointError(f"{problem} at {_said(path)} cannot be stored.", remedy=_REMEDY)
        entry: dict[str, Any] = {}
        tensor = value.detach()
        # Lazy conjugates have other bytes than values.
        tensor = tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor
        self._leaves.append((tensor, entry, self._name(path)))
        return entry

    def _name(self, path: tuple[Any, ...]) -> str:
        return ".".join(str(part).encode("utf-8", "replace").decode() for part in path) or "tensor"

    def _free(self, name: str) -> str:
        """The name, with a number where it is taken ({"a.b": ...} beside {"a": {"b": ...}}) or the format's own."""
        found, n = name, 1
        while found in self._tensors or found in self._taken or found == "__metadata__":
            n += 1
            found = f"{name}#{n}"
        return found

    def _by_storage(self) -> Iterable[list[tuple[torch.Tensor, dict[str, Any], str]]]:
        groups: dict[Any, list[tuple[torch.Tensor, dict[str, Any], str]]] = {}
        for n, leaf in enumerate(self._leaves):
            tensor = leaf[0]
            pointer = tensor.untyped_storage().data_ptr()
            # Tensors without memory share nothing.
            key = (tensor.device, pointer) if pointer and tensor.numel() else n
            groups.setdefault(key, []).append(leaf)
        return groups.values()

    def _write(self, group: list[tuple[torch.Tensor, dict[str, Any], str]]) -> None:
        first, _, name = group[0]
        name = self._free(name)
        low, high = min(_span(t)[0] for t, _, _ in group), max(_span(t)[1] for t, _, _ in group)
        same = all(_place(t) == _place(first) for t, _, _ in group)
        if same and high - low >= first.numel() * first.element_size():
            self._tensors[name] = first
            stride = _dense_stride(first)
            for _, entry, _ in group:
                entry["tensor"] = name
                if stride:
                    entry["stride"] = list(stride)
            return
        if any((_span(t)[0] - low) % t.element_size() for t, _, _ in group):
            low = 0  # two dtypes on one storage, not aligned to each other from the first byte used
        self._tensors[name] = _memory(first, low, high)
        self._views(group, name, low)

    def _views(self, group: list[tuple[torch.Tensor, dict[str, Any], str]], name: str, low: int) -> None:
        for tensor, entry, _ in group:
            entry["view"] = name
            entry["dtype"] = str(tensor.dtype).removeprefix("torch.")
            entry["shape"] = list(tensor.shape)
            entry["stride"] = list(tensor.stride())
            entry["offset"] = (_span(tensor)[0] - low) // tensor.element_size()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last byte a tensor uses in its storage."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    if not tensor.numel():
        return first, first
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (int(last) + 1) * size


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _memory(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The bytes of a tensor's storage from `low` to `high`, uint8 (high - low,)."""
    import torch

    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), low, (high - low,), (1,))


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The strides to restore: of a tensor whose elements fill a block in another order (channels_last)."""
    if tensor.is_contiguous():
        return None
    axes = sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    expected = 1
    for step, n in axes:
        if step != expected:
            return None
        expected *= n
    return tuple(tensor.stride())


def _not_storable(value: Any) -> str:
    """Why a value cannot be a leaf; empty for a dense tensor with memory."""
    import sys

    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return f"a value of type {name}"
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"a tensor of type {name}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"a tensor of layout {value.layout}"
    if value.device.type == "meta":
        return "a tensor without values (device meta)"
    return ""


def _integer(value: int, path: tuple[Any, ...]) -> Any:
    if -(2**63) <= value < 2**63:
        return value
    if value.bit_length() > _INT_BITS:
        raise CheckpointError(f"the integer at {_said(path)} has {value.bit_length()} bits.", remedy=_REMEDY)
    return {"int": hex(value)}


def _text(value: str) -> Any:
    """The string itself where UTF-8 can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"text": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _plain(versions: Any) -> Any:
    """`_metadata` of a state dict as plain dicts; None where it is anything unusual."""
    if not isinstance(versions, dict):
        return None
    return {k: dict(v) if isinstance(v, dict) else v for k, v in versions.items() if isinstance(k, str)}


def _said(path: tuple[Any, ...]) -> str:
    return "the top" if not path else "".join(f"[{part!r:.80}]" for part in path)


class _Joiner:
    def __init__(self, tensors: Tensors, leaf: Leaf | None, spread: Whole | None) -> None:
        self._tensors, self._leaf, self._whole = tensors, leaf, spread
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def value(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError("the stored state is nested too deeply.", remedy=_BROKEN)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self.value(item, depth + 1) for item in value]
        try:
            tag = next(iter(value))
            return _TAGS[tag](self, value, depth + 1)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"the stored state cannot be put together: {error!s:.200}.", remedy=_BROKEN) from None

    def _items(self, value: Any, depth: int) -> list[Any]:
        if not isinstance(value, list):
            raise TypeError("a list was expected")
        return [self.value(item, depth) for item in value]

    def _dict(self, value: Any, depth: int) -> Any:
        return {key: self.value(item, depth) for key, item in value["dict"].items()}

    def _pairs(self, value: Any, depth: int) -> Any:
        pairs = ((self.value(key, depth), self.value(item, depth)) for key, item in value["pairs"])
        found = {}
        for key, item in pairs:
            if type(key) not in (str, int):
                raise TypeError("a key is neither str nor int")
            found[key] = item
        return found

    def _state_dict(self, value: Any, depth: int) -> Any:
        found = OrderedDict((key, self.value(item, depth)) for key, item in value["state_dict"].items())
        versions = self.value(value["versions"], depth)
        if versions is not None:
            found._metadata = versions  # type: ignore[attr-defined]
        return found

    def _int(self, value: Any, depth: int) -> Any:
        if len(value["int"]) > _INT_BITS // 4 + 3:
            raise ValueError("an integer is too long")
        return int(value["int"], 16)

    def _float(self, value: Any, depth: int) -> Any:
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[value["float"]]

    def _tensor(self, value: Any, depth: int) -> Any:
        name, stride = value["tensor"], value.get("stride")
        if self._leaf is not None:
            return self._leaf(name, stride)
        tensor = self._tensors[name]
        if stride is None:
            return tensor
        key = (name, *stride)
        if key not in self._made:
            self._made[key] = in_order(tensor, stride)
        return self._made[key]

    def _spread(self, value: Any, depth: int) -> Any:
        name, shape = value["spread"], value["shape"]
        if self._whole is None or type(name) is not str or len(shape) > MAX_DEPTH:
            raise TypeError("a tensor is spread over ranks that are not there")
        if not all(type(n) is int and 0 <= n < 2**60 for n in shape):
            raise ValueError("a shape is no natural number")
        return self._whole(name, tuple(shape))

    def _view(self, value: Any, depth: int) -> Any:
        import torch

        memory, dtype = self._memory(value["view"]), getattr(torch, value["dtype"])
        shape, stride, offset = value["shape"], value["stride"], value["offset"]
        if not isinstance(dtype, torch.dtype) or memory.dtype is not torch.uint8:
            raise TypeError("a view of no memory")
        if len(shape) != len(stride) or not isinstance(offset, int) or offset < 0:
            raise ValueError(f"the view of {value['view']!r} does not fit")
        if (offset + reach(shape, stride)) * dtype.itemsize > memory.numel():
            raise ValueError(f"the view of {value['view']!r} reaches beyond its memory")
        key = (value["view"], value["dtype"], *shape, *stride, offset)
        if key not in self._made:
            empty = torch.empty(0, dtype=dtype, device=memory.device)
            self._made[key] = empty.set_(memory.untyped_storage(), offset, tuple(shape), tuple(stride))
        return self._made[key]

    def _memory(self, name: str) -> torch.Tensor:
        """Bytes that begin at the beginning of their storage."""
        memory = self._tensors[name]
        if memory.storage_offset() or not memory.is_contiguous():
            if (name,) not in self._made:
                self._made[(name,)] = memory.clone()
            memory = self._made[(name,)]
        return memory


def in_order(tensor: torch.Tensor, stride: Iterable[int]) -> torch.Tensor:
    """A tensor with its elements in another order in memory, as these strides say.

    Raises:
        ValueError: they are not a permutation of the elements: never more memory than was read.
    """
    import torch

    found = tuple(stride)
    if len(found) != tensor.dim() or reach(tensor.shape, found) != tensor.numel():
        raise ValueError("the strides of a tensor do not fit")
    return torch.empty_strided(tensor.shape, found, dtype=tensor.dtype).copy_(tensor)


def reach(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements from the first to the last of a strided tensor, both counted."""
    found = 1
    for n, step in zip(shape, stride, strict=True):
        if type(n) is not int or type(step) is not int or n < 0 or step < 0:
            raise ValueError("a shape or stride is no natural number")
        if n == 0:
            return 0
        found += (n - 1) * step
    return found


_TAGS: dict[str, Callable[[_Joiner, Any, int], Any]] = {
    "dict": _Joiner._dict,
    "pairs": _Joiner._pairs,
    "state_dict": _Joiner._state_dict,
    "tuple": lambda joiner, value, depth: tuple(joiner._items(value["tuple"], depth)),
    "int": _Joiner._int,
    "float": _Joiner._float,
    "text": lambda joiner, value, depth: bytes.fromhex(value["text"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda joiner, value, depth: b64decode(value["bytes"], validate=True),
    "spread": _Joiner._spread,
    "tensor": _Joiner._tensor,
    "view": _Joiner._view,
}
