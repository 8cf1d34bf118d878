"""Every technique, by name. One line each: delete a technique's file, its test and its line, and nothing else changes.

Third parties add theirs with the entry point group `upshift.techniques` (name -> class).
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import cast

from upshift.errors import PlanError
from upshift.records.plan import Plan, Setting
from upshift.sites import Technique

#: Name -> module:class, in the order in which they are applied.
BUILT_IN = {
    "allocator": "upshift.techniques.allocator:Allocator",
    "threads": "upshift.techniques.threads:Threads",
    "denormals": "upshift.techniques.denormals:Denormals",
    "loader": "upshift.techniques.loader:Loader",
    "cache": "upshift.techniques.cache:Cache",
    "channels_last": "upshift.techniques.channels_last:ChannelsLast",
    "bf16": "upshift.techniques.bf16:Bf16",
    "attention": "upshift.techniques.attention:Attention",
    "compile": "upshift.techniques.compile:Compile",
    "fused": "upshift.techniques.fused:Fused",
}


@cache
def get(name: str) -> Technique:
    """The technique called `name`.

    Raises:
        PlanError: there is none; the remedy lists those there are.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return cast(Technique, getattr(importlib.import_module(module), attribute)())
    for point in entry_points(group="upshift.techniques"):
        if point.name == name:
            return cast(Technique, point.load()())
    raise PlanError(f"there is no technique called {name!r}.", remedy=f"Known: {', '.join(names())}.")


def names() -> tuple[str, ...]:
    """All names, built-in ones first."""
    extra = sorted(point.name for point in entry_points(group="upshift.techniques"))
    return (*BUILT_IN, *(name for name in extra if name not in BUILT_IN))


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
    for item in plan.kept:
        if item.name not in names():
            raise PlanError(
                f"{place}: there is no technique called {item.name!r}.", remedy=f"Known: {', '.join(names())}."
            )
        specs = get(item.name).card.settings
        for key, value in item.settings.items():
            if key not in specs:
                known = ", ".join(specs) or "none"
                raise PlanError(f"{place}: {item.name} has no setting {key!r}.", remedy=f"It has: {known}.")
            problem = specs[key].problem(value)
            if problem:
                raise PlanError(
                    f"{place}: {item.name}.{key}: {problem}.", remedy="Correct it, or run upshift tune anew."
                )
