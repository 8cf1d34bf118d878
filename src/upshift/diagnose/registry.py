"""Every diagnosis rule, by name. Delete a rule's file, its test and its line here, and nothing else changes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from upshift.diagnose.card import FindingCard
from upshift.diagnose.evidence import rank
from upshift.errors import UsageError
from upshift.records import Finding, Measurement

Rule = Callable[[Measurement], Finding | None]

#: Name -> module; each holds `CARD` and `rule`.
RULES = {
    name: f"upshift.diagnose.rules.{name}"
    for name in (
        "data_starved",
        "host_batching",
        "slow_dataset_line",
        "fp32_where_bf16_is_faster",
        "unfused_optimizer",
        "conv_layout",
        "attention_kernel",
        "compile_candidate",
        "small_batch_overhead",
        "sync_per_step",
        "logging_each_step",
        "evaluation_too_often",
        "checkpoint_too_often",
        "allocator_churn",
        "threads_mismatch",
        "startup_dominates",
        "near_floor",
    )
}


@cache
def card(name: str) -> FindingCard:
    """The card of the rule called `name`.

    Raises:
        UsageError: there is none.
    """
    return cast(FindingCard, _module(name).CARD)


@cache
def rule(name: str) -> Rule:
    """The rule called `name`. Raises `UsageError` where there is none."""
    return cast(Rule, _module(name).rule)


def _module(name: str) -> Any:
    if name not in RULES:
        raise UsageError(f"there is no finding called {name!r}.", remedy=f"Known: {', '.join(RULES)}.")
    return importlib.import_module(RULES[name])


def cards() -> tuple[FindingCard, ...]:
    """The cards of all rules."""
    return tuple(card(name) for name in RULES)


def diagnose(m: Measurement) -> tuple[Finding, ...]:
    """What every rule finds in a measurement, ranked by predicted gain times confidence; notes come last."""
    found = [finding for name in RULES if (finding := rule(name)(m)) is not None]
    return tuple(sorted(found, key=rank, reverse=True))
