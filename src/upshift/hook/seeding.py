"""The same random streams in both arms of a trial, unless the script seeds itself (then its own seeds win)."""

from __future__ import annotations

import random
from types import ModuleType

from upshift.hook.imports import AfterImport


def seed(value: int, imports: AfterImport) -> None:
    """Seed Python now and numpy when it is imported; torch is seeded by the hook."""
    random.seed(value)

    def numpy_ready(module: ModuleType) -> None:
        module.seed(value % 2**32)

    imports.on("numpy.random", numpy_ready)
