"""Run a script or module as `__main__`, as `python` would."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from pathlib import Path
from typing import Any

from upshift.errors import UsageError

_OURS = str(Path(__file__).resolve().parent.parent) + os.sep


def without_our_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback with the frames of upshift (and of the import machinery below them) left out."""
    kept = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OURS):
            kept.append(trace)
        trace = trace.tb_next
    result: types.TracebackType | None = None
    for item in reversed(kept):
        result = types.TracebackType(result, item.tb_frame, item.tb_lasti, item.tb_lineno)
    return result


def clean(error: BaseException) -> None:
    """Take our frames out of an exception and of those it is chained to."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        chain.__traceback__ = without_our_frames(chain.__traceback__)
        for inner in chain.exceptions if isinstance(chain, BaseExceptionGroup) else ():
            clean(inner)
        chain = chain.__cause__ or chain.__context__


def clean_excepthook() -> None:
    """Let the interpreter print an uncaught exception without our frames, through whatever hook the script set."""
    inner = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        clean(error)
        inner(kind, error, error.__traceback__)

    sys.excepthook = hook


def _main_module(**attributes: Any) -> types.ModuleType:
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __annotations__={}, **attributes)
    sys.modules["__main__"] = module
    return module


def give_way(folder: str, before: frozenset[str]) -> None:
    """Forget modules that python would not have loaded yet and that a file in `folder` shadows.

    A script with a `queue.py` beside it imports its own, as under `python`; upshift keeps what it has imported.

    Args:
        before: names of the modules the interpreter had loaded when it started.
    """
    try:
        entries = os.listdir(folder)
    except OSError:
        return
    suffixes = tuple(importlib.machinery.all_suffixes())
    for entry in entries:
        name = entry.partition(".")[0]
        if name not in sys.modules or name in before or name in ("upshift", "__main__"):
            continue
        package = os.path.join(folder, entry)
        if entry.endswith(suffixes) or os.path.isfile(os.path.join(package, "__init__.py")):
            for loaded in [item for item in sys.modules if item == name or item.startswith(name + ".")]:
                del sys.modules[loaded]


#: Modules the interpreter had loaded before any of ours; set by the first file of a hooked process.
LOADED_AT_START: frozenset[str] = frozenset()


def _first_on_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)
        if LOADED_AT_START:
            give_way(folder, LOADED_AT_START)


def run_script(path: str, arguments: tuple[str, ...]) -> None:
    """Run the file at `path` as `__main__`. Exceptions, SystemExit included, pass through.

    Raises:
        UsageError: the file cannot be read.
    """
    # As python does it: `..` and `.` stay in the path.
    absolute = os.path.join(os.getcwd(), path)
    try:
        with io.open_code(absolute) as file:
            source = file.read()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.", remedy="Name a Python script.") from None
    sys.argv[:] = [path, *arguments]
    _first_on_path(os.path.dirname(os.path.realpath(path)))
    loader = importlib.machinery.SourceFileLoader("__main__", absolute)
    module = _main_module(__file__=absolute, __cached__=None, __spec__=None, __package__=None, __loader__=loader)
    exec(compile(source, absolute, "exec", dont_inherit=True), module.__dict__)


def run_module(name: str, arguments: tuple[str, ...]) -> None:
    """Run a module or package as `python -m name` does.

    Raises:
        UsageError: there is no such module, or it cannot be run.
    """
    _first_on_path(os.getcwd())
    sys.argv[:] = ["-m", *arguments]
    asked = name
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # A parent package that is missing, not something a parent package failed to import.
        if error.name is None or not asked.startswith(error.name):
            raise
        raise UsageError(f"no module named {error.name}.", remedy="Check the name given to -m.") from None
    except ValueError:
        raise UsageError(f"{asked!r} is not the name of a module.", remedy="Check the name given to -m.") from None
    if spec is None:
        if name != asked:
            raise UsageError(f"{asked} is a package without a __main__.", remedy="Name a module inside it.")
        raise UsageError(f"no module named {name}.", remedy="Check the name given to -m.")
    loader = getattr(spec, "loader", None)
    code = loader.get_code(name) if loader is not None and hasattr(loader, "get_code") else None
    if code is None:
        raise UsageError(f"module {name} cannot be run.", remedy="Name a module with Python source.")
    sys.argv[0] = spec.origin or name
    module = _main_module(
        __file__=spec.origin, __cached__=spec.cached, __spec__=spec, __package__=spec.parent, __loader__=loader
    )
    exec(code, module.__dict__)


def has_main_guard(path: str) -> bool:
    """Whether the script protects its main part with `if __name__ == "__main__"` (spawned workers import it)."""
    import ast

    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    for node in tree.body:
        if isinstance(node, ast.If):
            names = {item.id for item in ast.walk(node.test) if isinstance(item, ast.Name)}
            if "__name__" in names:
                return True
    return False
