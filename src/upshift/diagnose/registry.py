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
        "workers_restarted",
        "host_batching",
        "slow_dataset_line",
        "fp32_where_bf16_is_faster",
        "double_precision",
        "double_forward",
        "python_loop",
        "needless_graph",
        "dense_embedding_gradient",
        "unfused_optimizer",
        "conv_layout",
        "attention_kernel",
        "compile_candidate",
        "recompiles",
        "small_batch_overhead",
        "tiny_micro_batches",
        "sync_per_step",
        "logging_each_step",
        "slow_loop_line",
        "evaluation_too_often",
        "checkpoint_too_often",
        "allocator_churn",
        "threads_mismatch",
        "startup_dominates",
        "near_floor",
        "loss_not_falling",
        "loss_at_zero",
        "never_learns",
        "not_in_optimizer",
        "trains_in_eval_mode",
        "evaluates_in_train_mode",
        "overfitting",
        "no_early_stopping",
        "constant_rate",
        "batch_below_noise_scale",
        "no_validation",
        "decay_on_norms",
        "no_seed",
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
