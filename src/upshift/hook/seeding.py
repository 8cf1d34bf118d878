"""Random streams of a trial: the same in both arms, or, over whole runs, another one for every seed."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

from upshift.hook.imports import AfterImport


def seed(value: int, imports: AfterImport) -> None:
    """Seed Python now and numpy when it is imported; torch is seeded by the hook.

    Where the script seeds itself, its own seeds win.
    """
    random.seed(value)

    def numpy_ready(module: ModuleType) -> None:
        module.seed(value % 2**32)

    imports.on("numpy.random", numpy_ready)


def shift(by: int, imports: AfterImport) -> None:
    """Add `by` to the seeds that the script sets itself, so that every seed is another run of it.

    Covers `random.seed`, `numpy.random.seed`, `numpy.random.default_rng` and `torch.manual_seed`, given whole numbers.
    """

    def moved(owner: Any, name: str, limit: int) -> None:
        original = getattr(owner, name)

        def seeding(value: Any = None, *args: Any, **kwargs: Any) -> Any:
            if isinstance(value, int):
                value = (value + by) % limit
            return original(value, *args, **kwargs) if value is not None else original(*args, **kwargs)

        setattr(owner, name, seeding)

    def numpy_ready(module: ModuleType) -> None:
        moved(module, "seed", 2**32)
        moved(module, "default_rng", 2**63)

    def torch_ready(module: ModuleType) -> None:
        moved(module, "manual_seed", 2**63)

    moved(random, "seed", 2**63)
    imports.on("numpy.random", numpy_ready)
    imports.on("torch", torch_ready)
