"""`jobs.py:cifar`: find the job that a command line names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from upshift.engine.job import Job
from upshift.errors import UsageError


def load_job(reference: str, settings: dict[str, str] | None = None) -> Job:
    """The job called NAME in `FILE.py:NAME`: a `Job`, or a function that returns one.

    The file is imported under its own name with its folder first on the path, so that loader workers find it again.

    Args:
        settings: values for arguments of that function, else for fields of the job, as text (`--set epochs=3`).

    Raises:
        UsageError: no such file, name or setting, or something else than a job.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file}.", remedy="Name a job as jobs.py:NAME.")
    module = _import(path)
    found = getattr(module, name, None)
    if found is None:
        known = sorted(key for key, value in vars(module).items() if _may_be_a_job(value, module))
        listed = f"It has {', '.join(known)}." if known else "Define NAME = Job(…), or a function of that name."
        raise UsageError(f"{file} has no {name!r}.", remedy=listed)
    values = {key: _value(text) for key, text in (settings or {}).items()}
    if not isinstance(found, Job):
        found = _call(found, reference, values)
    job = found.set(**values) if values else found
    return job if job.name else job.set(name=name)


def _may_be_a_job(value: Any, module: ModuleType) -> bool:
    """A Job, or a function of the module that can be called as it is."""
    if isinstance(value, Job):
        return True
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    return all(
        item.default is not item.empty or item.kind in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
        for item in inspect.signature(value).parameters.values()
    )


def _import(path: Path) -> ModuleType:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    loaded = sys.modules.get(path.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == path.resolve():
        return loaded
    if loaded is not None:
        raise UsageError(
            f"{path} has the name of a module that is already loaded ({path.stem}).", remedy="Rename the file."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file.", remedy="Name a job as jobs.py:NAME.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _call(found: Any, reference: str, values: dict[str, Any]) -> Job:
    """The job that a function returns; takes the settings that are its arguments out of `values`."""
    if not callable(found):
        raise UsageError(
            f"{reference} is a {type(found).__name__}, not a Job.", remedy="Name a Job, or a function that returns one."
        )
    parameters = inspect.signature(found).parameters
    mine = {key: values.pop(key) for key in list(values) if key in parameters}
    missing = [
        key
        for key, item in parameters.items()
        if item.default is item.empty and key not in mine and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
    ]
    if missing:
        raise UsageError(
            f"{reference} needs {', '.join(missing)}.",
            remedy="Give it: " + " ".join(f"--set {key}=…" for key in missing),
        )
    job = found(**mine)
    if not isinstance(job, Job):
        raise UsageError(f"{reference} returned a {type(job).__name__}, not a Job.", remedy="Return a Job.")
    return job


def _value(text: str) -> Any:
    """A number, truth value or None as Python writes it; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
