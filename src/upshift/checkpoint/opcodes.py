"""What a pickle says, without doing it: nothing is imported, nothing is called, objects become `Named` records.

Weights of other programs are pickles (.pt), and so is the index of a DCP folder. Looking first bounds what loading
them can allocate or run. Opcodes: `pickletools` of the standard library, which only takes the stream apart.
"""

from __future__ import annotations

import pickletools
from typing import Any

from upshift.errors import CheckpointError

#: An index of weights is small; a larger one would take minutes to look through.
MAX_BYTES = 32 * 2**20

_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
           "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "SHORT_BINSTRING"}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Named:
    """Something a pickle names: `name` is module.attribute; `args` those of its call, None where it is not called.

    `state` is what it would be built with. A persistent id is named "persistent".
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


def look(data: bytes) -> tuple[Any, list[Named]]:
    """The object a pickle would build, of plain containers and `Named`, and everything it names or would call.

    Raises:
        CheckpointError: no pickle, or one with opcodes that weights do not need.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"its index has {len(data):,} bytes, more than {MAX_BYTES:,}.")
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.stack.pop(), machine.used
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"its index is no readable pickle: {error!s:.120}.") from None


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.used: list[Named] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}[name]())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in _TUPLES:
            self._tuple(len(stack) - _TUPLES[name])
        elif name == "TUPLE":
            self._tuple(self._marks.pop())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._above(len(stack) - 1 if name == "APPEND" else self._marks.pop())
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._above(len(stack) - 2 if name == "SETITEM" else self._marks.pop())
            self._set(stack[-1], items)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BINPERSID", "BUILD"):
            self._object(name, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise CheckpointError(f"its index uses the opcode {name}, which weights do not need.")

    def _object(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "GLOBAL":
            stack.append(Named(argument.replace(" ", ".", 1)))
            self.used.append(stack[-1])
        elif name == "BINPERSID":
            stack.append(Named("persistent", tuple(stack.pop())))
            self.used.append(stack[-1])
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Named):
                stack[-1].state = state
        else:
            last, first = stack.pop(), stack.pop()
            if name == "STACK_GLOBAL":
                stack.append(Named(f"{first}.{last}"))
                self.used.append(stack[-1])
                return
            called = first.name if isinstance(first, Named) and first.args is None else "something computed"
            stack.append(Named(called, tuple(last)))
            self.used.append(stack[-1])

    def _tuple(self, start: int) -> None:
        items = self._above(start)
        self.stack.append(tuple(items))

    def _above(self, start: int) -> list[Any]:
        if start < 0:
            raise CheckpointError("its index ends early.")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _set(self, target: Any, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, Named):  # an OrderedDict is called first and filled then
            target.state = {**(target.state or {}), **dict(pairs)}
        else:
            target.update(pairs)
