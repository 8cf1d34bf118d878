"""Every technique, by name. One line each: delete a technique's file, its test and its line, and nothing else changes.

Third parties add theirs with the entry point group `upshift.techniques` (name -> class).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from upshift.errors import PlanError
from upshift.records.plan import Plan, Setting
from upshift.sites import Technique

#: Name -> module:class, in the order in which they are applied.
BUILT_IN = {
    "allocator": "upshift.techniques.allocator:Allocator",
    "expandable_segments": "upshift.techniques.expandable_segments:ExpandableSegments",
    "threads": "upshift.techniques.threads:Threads",
    "denormals": "upshift.techniques.denormals:Denormals",
    "loader": "upshift.techniques.loader:Loader",
    "cache": "upshift.techniques.cache:Cache",
    "prefetch": "upshift.techniques.prefetch:Prefetch",
    "device_dataset": "upshift.techniques.device_dataset:DeviceDataset",
    "channels_last": "upshift.techniques.channels_last:ChannelsLast",
    "bf16": "upshift.techniques.bf16:Bf16",
    "fp16": "upshift.techniques.fp16:Fp16",
    "tf32": "upshift.techniques.tf32:Tf32",
    "cudnn_benchmark": "upshift.techniques.cudnn_benchmark:CudnnBenchmark",
    "attention": "upshift.techniques.attention:Attention",
    "compile": "upshift.techniques.compile:Compile",
    "activation_checkpointing": "upshift.techniques.activation_checkpointing:ActivationCheckpointing",
    "activation_offload": "upshift.techniques.activation_offload:ActivationOffload",
    "optimizer_offload": "upshift.techniques.optimizer_offload:OptimizerOffload",
    "low_bit_optimizer": "upshift.techniques.low_bit_optimizer:LowBitOptimizer",
    "fp8": "upshift.techniques.fp8:Fp8",
    "fused": "upshift.techniques.fused:Fused",
    "larger_batch": "upshift.techniques.larger_batch:LargerBatch",
    "schedule": "upshift.techniques.schedule:Schedule",
    "label_smoothing": "upshift.techniques.label_smoothing:LabelSmoothing",
    "ema": "upshift.techniques.ema:Ema",
}


#: Entry point group of third parties: name -> module:class.
GROUP = "upshift.techniques"


@cache
def get(name: str) -> Technique:
    """The technique called `name`.

    Raises:
        PlanError: there is none, and the remedy lists those there are; or its package cannot be loaded.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return cast(Technique, getattr(importlib.import_module(module), attribute)())
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _load(point)
    raise PlanError(f"there is no technique called {name!r}.", remedy=f"Known: {', '.join(names())}.")


def _load(point: EntryPoint) -> Technique:
    try:
        return cast(Technique, point.load()())
    except Exception as error:  # foreign code may raise anything
        package = point.dist.name if point.dist is not None else "an installed package"
        raise PlanError(
            f"the technique {point.name!r} of {package} cannot be loaded from {point.value}: "
            f"{type(error).__name__}: {error}.",
            remedy=f"Repair or remove the package: pip uninstall {package}.",
        ) from error


def names() -> tuple[str, ...]:
    """All names, built-in ones first."""
    extra = sorted(point.name for point in entry_points(group=GROUP))
    return (*BUILT_IN, *(name for name in extra if name not in BUILT_IN))


def packages(chosen: Iterable[str]) -> tuple[str, ...]:
    """`name version` of every package other than upshift that one of these techniques comes from."""
    others = set(chosen) - set(BUILT_IN)
    if not others:
        return ()
    found = {
        f"{point.dist.name} {point.dist.version}"
        for point in entry_points(group="upshift.techniques")
        if point.name in others and point.dist is not None
    }
    return tuple(sorted(found))


def all_techniques() -> tuple[Technique, ...]:
    """One instance of each."""
    return tuple(get(name) for name in names())


def in_order(
    chosen: dict[str, dict[str, bool | int | float | str]],
) -> list[tuple[Technique, dict[str, bool | int | float | str]]]:
    """Techniques with their settings filled up with defaults, in the order in which they must be applied."""
    result: list[tuple[Technique, dict[str, Setting]]] = []
    for name in sorted(chosen, key=lambda item: names().index(item) if item in names() else len(names())):
        technique = get(name)
        settings = {key: spec.default for key, spec in technique.card.settings.items()}
        settings.update(chosen[name])
        result.append((technique, settings))
    return result


def check_plan(plan: Plan, place: str) -> None:
    """Refuse a plan with an unknown technique, setting or value.

    Raises:
        PlanError: with the place of the mistake.
    """
    chosen = [item.name for item in plan.kept]
    for item in plan.kept:
        if item.name not in names():
            raise PlanError(
                f"{place}: there is no technique called {item.name!r}.", remedy=f"Known: {', '.join(names())}."
            )
        card = get(item.name).card
        clash = next((other for other in chosen if other in card.conflicts), "")
        if clash:
            raise PlanError(
                f"{place}: {item.name} and {clash} conflict.", remedy="Keep one of them, or run upshift tune anew."
            )
        specs = card.settings
        for key, value in item.settings.items():
            if key not in specs:
                known = ", ".join(specs) or "none"
                raise PlanError(f"{place}: {item.name} has no setting {key!r}.", remedy=f"It has: {known}.")
            problem = specs[key].problem(value)
            if problem:
                raise PlanError(
                    f"{place}: {item.name}.{key}: {problem}.", remedy="Correct it, or run upshift tune anew."
                )
