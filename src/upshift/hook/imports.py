"""Call back right after a module has been imported, without importing it ourselves.

torch must be imported by the script, not before it: scripts set OMP_NUM_THREADS or CUDA_VISIBLE_DEVICES first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _After(importlib.abc.Loader):
    """A loader that runs the real one and then the callback."""

    def __init__(self, loader: Any, callback: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module must look as if nothing had stood between.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._callback(module)


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs callbacks after the first import of the modules named."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._busy: set[str] = set()

    def on(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        """Call `callback(module)` when `name` has been imported; at once if it already is."""
        if name in sys.modules:
            callback(sys.modules[name])
            return
        self._callbacks.setdefault(name, []).append(callback)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Wrap the real loader of a module we wait for."""
        if fullname not in self._callbacks or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        # Whoever asks may only want to know whether the module is there: the callbacks wait for its import.
        spec.loader = _After(spec.loader, lambda module: self._imported(fullname, module))
        return spec

    def _imported(self, name: str, module: ModuleType) -> None:
        callbacks = self._callbacks.pop(name, [])
        if not self._callbacks and self in sys.meta_path:
            sys.meta_path.remove(self)
        for callback in callbacks:
            callback(module)
