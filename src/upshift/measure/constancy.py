"""Does reading an object leave everything as it was? Random streams, and what an object holds.

Two questions a cache or a set of long-lived workers must be able to answer about a dataset it cannot look into:
did this read draw random numbers, and is the dataset still the one that was read before.
"""

from __future__ import annotations

import ctypes
import random
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

#: Objects looked at below one root; beyond them only the re-reads of a cache can see a change.
MAX_OBJECTS = 4000

#: Bytes of an array that enter its fingerprint; a larger one is sampled evenly.
MAX_BYTES = 2**20

#: Items of a plain list or tuple whose values enter the fingerprint.
MAX_ITEMS = 1_000_000

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


def _numpy() -> Any:
    import numpy

    return numpy


def _generator_kinds() -> tuple[type, ...]:
    import torch

    np = _numpy()
    return (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)


def _state_of(generator: Any) -> Any:
    import torch

    np = _numpy()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.state


def _set_state(generator: Any, state: Any) -> None:
    import torch

    np = _numpy()
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.state = state


def _same(first: Any, second: Any) -> bool:
    import torch

    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, _numpy().ndarray):
        return bool((first == second).all()) if first.shape == second.shape else False
    return bool(first == second)


def _cuda_states() -> tuple[Any, ...] | None:
    """States of the CUDA generators; None while CUDA is not in use (asking would start it)."""
    import torch

    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return tuple(torch.cuda.get_rng_state_all()) if in_use else None


class Streams:
    """A snapshot of every random stream a dataset could draw from.

    The global ones of `random`, numpy and torch (CPU, and CUDA once it is in use), and the generators in `owned`.
    """

    def __init__(self, owned: Iterable[Any] = ()) -> None:
        import torch

        self._owned = tuple(owned)
        self._python = random.getstate()
        self._numpy = _numpy().random.get_state(legacy=False)
        self._torch = torch.default_generator.get_state()
        self._cuda = _cuda_states()
        self._states = [_state_of(generator) for generator in self._owned]

    def moved(self) -> str:
        """Which stream is no longer where it was; the empty string where all are."""
        import torch

        if random.getstate() != self._python:
            return "Python's random"
        if not _same(_numpy().random.get_state(legacy=False), self._numpy):
            return "numpy's random state"
        if not torch.equal(torch.default_generator.get_state(), self._torch):
            return "torch's generator"
        cuda = _cuda_states()
        if self._cuda is not None and cuda is not None and not all(map(torch.equal, cuda, self._cuda)):
            return "the CUDA generator"
        for generator, state in zip(self._owned, self._states, strict=True):
            if not _same(_state_of(generator), state):
                return "a generator of its own"
        return ""

    def restore(self) -> None:
        """Put every stream back where it was, to the bit."""
        import torch

        random.setstate(self._python)
        _numpy().random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(list(self._cuda))
        for generator, state in zip(self._owned, self._states, strict=True):
            _set_state(generator, state)


@contextmanager
def streams_kept(owned: Iterable[Any] = ()) -> Iterator[Streams]:
    """Whatever is drawn inside, every stream is restored at the end, also after an exception."""
    streams = Streams(owned)
    try:
        yield streams
    finally:
        streams.restore()


def shift_streams(seed: int) -> None:
    """Put the global CPU streams somewhere else (for a read under another random state; restore them after)."""
    import torch

    random.seed(seed)
    _numpy().random.seed(seed % 2**32)
    # Not torch.manual_seed: that would also queue a reseeding of CUDA for later.
    torch.default_generator.manual_seed(seed)


def _array_print(array: Any) -> tuple[Any, ...]:
    flat = array.reshape(-1)
    step = max(1, flat.nbytes // MAX_BYTES)
    try:
        crc = zlib.crc32(flat[::step].tobytes())
    except (TypeError, ValueError, BufferError):
        crc = 0
    return ("array", str(array.dtype), array.shape, crc)


def _tensor_print(tensor: Any) -> tuple[Any, ...]:
    import torch

    version = -1 if tensor.is_inference() else tensor._version
    seen: tuple[Any, ...] = ("tensor", str(tensor.dtype), tuple(tensor.shape), str(tensor.device), version)
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_nested:
        return (*seen, id(tensor))
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() * flat.element_size() // MAX_BYTES)].contiguous()
    try:
        return (*seen, zlib.crc32(flat.view(torch.uint8).numpy().tobytes()))
    except (RuntimeError, TypeError):
        return (*seen, tensor.data_ptr())


def _list_print(items: Any) -> tuple[Any, ...] | None:
    """Length and contents of a plain list or tuple; None where its items have to be walked."""
    if len(items) <= 64 and not all(isinstance(item, _SIMPLE) for item in items):
        return None
    kept = items if len(items) <= MAX_ITEMS else items[:: len(items) // 100_000]
    try:
        return (type(items).__name__, len(items), hash(tuple(kept)))
    except TypeError:
        step = max(1, len(items) // 64)
        return (type(items).__name__, len(items), tuple(id(item) for item in items[::step]))


def _inside(thing: Any) -> Iterator[tuple[str, Any]]:
    """What hangs below an object that is neither simple nor an array: attributes, items, closures, globals it names."""
    if isinstance(thing, dict):
        for number, (key, value) in enumerate(list(thing.items())):
            if number >= 256:
                return
            yield f"[{key!r}]" if isinstance(key, _SIMPLE) else f"[{number}]", value
    elif isinstance(thing, (list, tuple)):
        for number, value in enumerate(thing):
            yield f"[{number}]", value
    elif isinstance(thing, types.FunctionType):
        yield from ((f".default{number}", value) for number, value in enumerate(thing.__defaults__ or ()))
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=False):
            try:
                yield f".{name}", cell.cell_contents
            except ValueError:
                continue
        for name in thing.__code__.co_names:
            value = thing.__globals__.get(name)
            if isinstance(value, _SIMPLE) and name in thing.__globals__ and not name.startswith("__"):
                yield f".global {name}", value
    elif isinstance(thing, types.MethodType):
        yield ".self", thing.__self__
        yield ".func", thing.__func__
    elif hasattr(thing, "func") and hasattr(thing, "keywords") and hasattr(thing, "args"):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    elif not isinstance(thing, (type, types.ModuleType)):
        attributes = getattr(thing, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((f".{key}", value) for key, value in list(attributes.items()))
        for kind in type(thing).__mro__:
            if kind.__module__.partition(".")[0] in ("builtins", "torch", "numpy", "typing", "abc", "collections"):
                continue
            for key, value in list(vars(kind).items()):
                if isinstance(value, _SIMPLE) and not key.startswith("__"):
                    yield f".class {key}", value
                elif key in ("__getitem__", "__getitems__", "__call__", "forward") and callable(value):
                    yield f".{key}", value


def _walk(root: Any, leaf: Callable[[Any], Any]) -> Iterator[tuple[str, Any, Any]]:
    """Breadth first over what can be reached from `root`, each object once: (path, object, leaf(object)).

    An object for which `leaf` returns None is walked into.
    """
    seen: dict[int, Any] = {}
    queue: list[tuple[str, Any]] = [("", root)]
    while queue and len(seen) < MAX_OBJECTS:
        following: list[tuple[str, Any]] = []
        for path, thing in queue:
            value = leaf(thing)
            yield path, thing, value
            if value is not None or id(thing) in seen or len(seen) >= MAX_OBJECTS:
                continue
            seen[id(thing)] = thing
            following.extend((path + name, value) for name, value in _inside(thing))
        queue = following


def _stops(thing: Any) -> bool | None:
    """True for what nothing can hang below, without the cost of a print."""
    import torch

    if isinstance(thing, (*_SIMPLE, torch.Tensor, _numpy().ndarray, ctypes._SimpleCData, set, frozenset)):
        return True
    if isinstance(thing, _generator_kinds()):
        return True
    return True if isinstance(thing, (list, tuple)) and len(thing) > 64 else None


def _leaf(thing: Any) -> tuple[Any, ...] | None:
    """The print of something that is not walked into, or None."""
    import torch

    if isinstance(thing, _SIMPLE):
        # The type and the text, so that 1, 1.0 and True differ and NaN equals itself.
        return (type(thing).__name__, repr(thing) if isinstance(thing, (float, complex)) else thing)
    if isinstance(thing, torch.Tensor):
        return _tensor_print(thing)
    if isinstance(thing, _numpy().ndarray):
        return _array_print(thing)
    if isinstance(thing, ctypes._SimpleCData):
        return ("ctypes", repr(thing.value))
    if isinstance(thing, _generator_kinds()):
        return ("generator", zlib.crc32(repr(_plain(_state_of(thing))).encode()))
    if isinstance(thing, (list, tuple)):
        return _list_print(thing)
    if isinstance(thing, (set, frozenset)):
        return (type(thing).__name__, len(thing))
    return None


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def fingerprint(root: Any) -> dict[str, tuple[Any, ...]]:
    """What an object holds, as far as plain Python can see it: path -> print.

    Attributes are read from `__dict__`, so no property runs. Numbers, strings, lists of them, arrays and tensors go in
    by value (large arrays by an even sample), transforms by their attributes, functions by their closure and the plain
    globals they name; anything else by identity and type. A change it misses must be caught by re-reading.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for path, thing, print_ in _walk(root, _leaf):
        if print_ is None:
            walked = next(iter(_inside(thing)), None) is not None
            print_ = ("object", type(thing).__qualname__, 0 if walked else id(thing))
            if isinstance(thing, types.FunctionType):
                print_ = ("function", id(thing.__code__))
            elif isinstance(thing, dict):
                print_ = ("dict", len(thing))
        found[path] = print_
    return found


def difference(first: dict[str, tuple[Any, ...]], second: dict[str, tuple[Any, ...]]) -> str:
    """The first path at which two fingerprints differ (`epoch`, `transform.size`), or the empty string."""
    if first == second:
        return ""
    for path in [*second, *first]:
        if first.get(path) != second.get(path):
            return path.lstrip(".") or "the object itself"
    return ""


def generators(root: Any) -> tuple[Any, ...]:
    """Random generators reachable from an object, that is its own random streams."""
    kinds = _generator_kinds()
    return tuple(thing for _, thing, _ in _walk(root, _stops) if isinstance(thing, kinds))


def tensors(root: Any) -> Iterator[Any]:
    """Tensors and numpy arrays reachable from an object."""
    import torch

    kinds = (torch.Tensor, _numpy().ndarray)
    return (thing for _, thing, _ in _walk(root, _stops) if isinstance(thing, kinds))


class Glance:
    """A check of an object's own attributes that costs a few microseconds, for every batch.

    Simple values are compared by value, everything else by identity. Objects below an attribute `dataset`
    (`Subset` and other wrappers) are looked at too.
    """

    def __init__(self, root: Any) -> None:
        self.seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for _ in range(8):
            attributes = getattr(root, "__dict__", None)
            if not isinstance(attributes, dict):
                break
            self.seen.append((attributes, dict(attributes)))
            root = attributes.get("dataset")

    def changed(self) -> str:
        """The name of an attribute that is not what it was, or the empty string."""
        for now, before in self.seen:
            if len(now) != len(before):
                return next(iter(now.keys() ^ before.keys()), "an attribute")
            for key, value in before.items():
                other = now.get(key, self)
                if other is value:
                    continue
                if type(other) is not type(value) or not isinstance(value, _SIMPLE) or other != value:
                    return key
        return ""
