"""The contract every technique owes, as reusable checks.

Each `check_*` function takes a technique and raises `AssertionError` with the reason where the contract is broken. They
run tiny models on the CPU through `sites.Stage`, as an adapter does. Under pytest, subclass `suite.TechniqueContract`;
without it:

    for check in contract.CHECKS:
        check(MyTechnique())
    for settings in contract.variants(MyTechnique()):
        for check in contract.TRAINING_CHECKS:
            check(MyTechnique(), settings)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from upshift.techniques import registry
from upshift.testing.promises import (
    CHECKS,
    check_card,
    check_nothing_seen,
    check_pure,
    check_registered,
    check_relations,
    check_says_nothing_done,
)
from upshift.testing.seen import defaults, measurement, variants
from upshift.testing.state import snapshot
from upshift.testing.tiny import Session, batch, build, staged
from upshift.testing.training import (
    TRAINING_CHECKS,
    check_identity,
    check_oracle,
    check_restores,
    check_saving,
    check_switching,
)

__all__ = [
    "CHECKS",
    "TRAINING_CHECKS",
    "Session",
    "batch",
    "build",
    "check_card",
    "check_identity",
    "check_nothing_seen",
    "check_oracle",
    "check_pure",
    "check_registered",
    "check_relations",
    "check_restores",
    "check_saving",
    "check_says_nothing_done",
    "check_switching",
    "defaults",
    "measurement",
    "present",
    "snapshot",
    "staged",
    "unregistered",
    "variants",
]


def present() -> tuple[str, ...]:
    """Registered techniques whose module exists."""
    result = []
    for name in registry.names():
        module = registry.BUILT_IN.get(name, "").partition(":")[0]
        if not module or importlib.util.find_spec(module) is not None:
            result.append(name)
    return tuple(result)


def unregistered() -> tuple[set[str], set[str]]:
    """Files of the folder that are not in the registry, and entries of the registry without a file."""
    folder = Path(registry.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
    entries = {target.partition(":")[0].rpartition(".")[2] for target in registry.BUILT_IN.values()}
    return files - entries, entries - files
