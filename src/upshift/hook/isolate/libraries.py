"""Paths that torch, safetensors and sqlite3 open in C++, Rust or C, mapped into the merged view."""

from __future__ import annotations

import functools
import os
import sys
import types
import urllib.parse
from collections.abc import Callable
from typing import Any

from upshift.hook.imports import AfterImport
from upshift.hook.isolate.mirror import Mirror


def _sqlite(mirror: Mirror, module: types.ModuleType) -> None:
    connect = module.connect

    def place(path: Any, writing: bool) -> Any:
        if not writing:
            return mirror.read(path) or path
        for suffix in ("-wal", "-journal"):
            if os.path.exists(os.fsdecode(path) + suffix):
                mirror.write(os.fsdecode(path) + suffix)
        return _writable(mirror, path, content=True) or path

    @functools.wraps(connect)
    def replacement(database: Any, *arguments: Any, **options: Any) -> Any:
        text = os.fsdecode(database)
        if text.startswith("file:") and options.get("uri", arguments[6] if len(arguments) > 6 else False):
            location, _, query = text[len("file:") :].partition("?")
            if "mode=memory" not in query and location not in ("", ":memory:"):
                path = urllib.parse.unquote(location.removeprefix("//localhost"))
                path = path[2:] if path.startswith("///") else path
                writing = "mode=ro" not in query and "immutable=1" not in query
                database = f"file:{urllib.parse.quote(place(path, writing))}" + (f"?{query}" if query else "")
        elif text not in ("", ":memory:"):
            database = place(database, True)
        return connect(database, *arguments, **options)

    _set(module, "connect", replacement)


def _set(module: types.ModuleType, name: str, replacement: Any) -> None:
    """Replace a function in its module and in those that re-export it and were imported before us."""
    original = vars(module)[name]
    for other in (module, *map(sys.modules.get, ("sqlite3", "torch", "torch.jit", "safetensors.torch"))):
        if other is not None and vars(other).get(name) is original:
            setattr(other, name, replacement)


_Where = Callable[[Any], str | None]


def _wrap(module: types.ModuleType, name: str, position: int, keyword: str, where: _Where) -> None:
    """Map one path argument of a function of a module that opens files itself."""
    original = getattr(module, name, None)
    if original is None:
        return

    @functools.wraps(original, updated=())
    def replacement(*arguments: Any, **options: Any) -> Any:
        path = arguments[position] if len(arguments) > position else options.get(keyword)
        if isinstance(path, (str, os.PathLike)):
            target = where(path) or path
            if len(arguments) > position:
                arguments = (*arguments[:position], target, *arguments[position + 1 :])
            else:
                options[keyword] = target
        return original(*arguments, **options)

    _set(module, name, replacement)


def _writable(mirror: Mirror, path: Any, content: bool) -> str | None:
    """Like `Mirror.write`, but where nothing can be written the path fails when used.

    The real file is copied only if `content`.
    """
    found = mirror.locate(path)
    if found is None or not found[1]:
        return found[0] if found else None
    try:
        return mirror.prepare(found[0], content)
    except OSError:
        return mirror.root + found[0]


def map_libraries(mirror: Mirror) -> None:
    """Map the paths that torch, safetensors and sqlite3 open in C++, Rust or C, once they are imported."""
    write: _Where = functools.partial(_writable, mirror, content=False)

    def torch(module: types.ModuleType) -> None:
        _wrap(module, "save", 1, "f", write)
        _wrap(module, "load", 0, "f", mirror.read)

    def safetensors(module: types.ModuleType) -> None:
        _wrap(module, "serialize_file", 1, "filename", write)
        _wrap(module, "safe_open", 0, "filename", mirror.read)

    after = AfterImport()
    after.on("torch.serialization", torch)
    after.on("torch.jit._serialization", torch)
    after.on("safetensors", safetensors)
    after.on("sqlite3.dbapi2", functools.partial(_sqlite, mirror))
