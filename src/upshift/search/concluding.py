"""What a search comes to, in words and figures."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upshift.records import Measurement, Pairing, Trial
from upshift.records.plan import Kept, Rejected
from upshift.records.trial import Fitted
from upshift.search.confirm import Confirmation

if TYPE_CHECKING:
    from upshift.search.duel import ArmPlan
    from upshift.sites import Numerics


@dataclass
class Outcome:
    """What the search found."""

    kept: tuple[Kept, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    trials: tuple[Trial, ...] = ()
    confirmation: Confirmation | None = None
    verdict: str = ""
    forecast: str = ""
    interrupted: bool = False
    seconds: float = 0.0
    break_even: float | None = None
    fitted: Fitted | None = None
    """Where memory is limited and the script needs more: what the plan needs, or what needed the least."""


_NEEDED = "without it the plan does not fit"
_NOT_ALONE = "taken alone: not resolved; the figure is from screening"
_NOT_SCREENED = "not resolved when screened: the plan's own figure is the evidence"


def said(outcome: Outcome, confirmation: Confirmation | None, trials: Sequence[Trial], *, loss_seen: bool) -> str:
    """The verdict of a search by step time, in words."""
    if outcome.kept and confirmation is not None and confirmation.pairing is not None:
        pairing, proof = confirmation.pairing, confirmation.proof
        names = " + ".join(item.name for item in outcome.kept)
        text = (
            f"{names}: {pairing.ratio:.2f}x faster steps (at least {pairing.low:.2f}x at 99 %, "
            f"{pairing.quads} quads); quality shown to rung '{proof.rung}' over {proof.steps} steps."
        )
        if proof.weaker:
            text += f" The proof is weaker than usual: {proof.weaker}."
        if outcome.break_even:
            text += f" One-off costs pay back after {outcome.break_even:,.0f} steps."
        return text
    if outcome.interrupted:
        return "Interrupted before anything was confirmed: keep your baseline (tune --resume goes on from here)."
    if not loss_seen:
        return "Keep your baseline: no scalar loss was seen at a backward call, so quality cannot be shown."
    if confirmation is not None and not confirmation.proof.passed:
        return f"Keep your baseline: faster, but quality was not shown: {confirmation.proof.reason}."
    if confirmation is not None:
        return "Keep your baseline: what looked faster when screened was not confirmed in fresh processes."
    tried = [trial for trial in trials if trial.stage == "screen" and trial.outcome != "not tried"]
    if not tried:
        skipped = next((trial.reason for trial in trials if trial.outcome == "not tried"), "nothing applies")
        return f"Keep your baseline: nothing was tried ({skipped})."
    return "Keep your baseline: nothing tried made the training step faster beyond the noise."


def kept(
    plan: ArmPlan,
    confirmation: Confirmation,
    numerics: Mapping[str, Numerics],
    screened: Mapping[str, Pairing | None],
    *,
    needed: Container[str],
) -> tuple[Kept, ...]:
    """The techniques of a confirmed plan, without those that had no effect.

    Args:
        screened: of each the ratio by which it was found, where it was found by one.
        needed: those without which the plan does not fit.
    """
    found = []
    for name, settings in plan.items():
        if name in confirmation.no_effect:
            continue
        first, alone = screened.get(name), confirmation.attribution.get(name)
        if name in needed:
            note = _NEEDED
        elif alone is not None:
            note = ""
        else:
            note = _NOT_ALONE if first is not None else _NOT_SCREENED
        found.append(
            Kept(
                name=name,
                settings=dict(settings),
                numerics=str(numerics[name]),
                speedup=None if first is None else first.ratio,
                low=None if first is None else first.low,
                high=None if first is None else first.high,
                pairs=0 if first is None else first.quads,
                attribution=None if alone is None else alone.ratio,
                attribution_low=None if alone is None else alone.low,
                attribution_high=None if alone is None else alone.high,
                note=note,
            )
        )
    return tuple(found)


def rejected(trials: Sequence[Trial], kept: Container[str], dropped: Mapping[str, str]) -> tuple[Rejected, ...]:
    """What was tried or looked at and is not in the plan: the last trial of each, with its reason.

    Args:
        dropped: technique -> why it came out of a plan that was to be confirmed.
    """
    found: dict[str, Rejected] = {}
    for trial in trials:
        name, pairing = trial.name.partition("(")[0], trial.pairing
        if trial.stage not in ("check", "screen") or name in kept:
            continue
        reason = trial.reason
        if trial.outcome == "faster":
            reason = dropped.get(name) or "faster when screened, not confirmed"
        found[trial.name] = Rejected(
            name=trial.name,
            reason=reason,
            speedup=None if pairing is None else pairing.ratio,
            low=None if pairing is None else pairing.low,
            high=None if pairing is None else pairing.high,
        )
    return tuple(found.values())


def break_even(confirmation: Confirmation) -> float | None:
    """Steps after which the one-off seconds are won back; None where there are none, or never."""
    pairing = confirmation.pairing
    if pairing is None or confirmation.one_off <= 0:
        return None
    saved = pairing.reference_step - pairing.candidate_step
    return confirmation.one_off / saved if saved > 0 else None


def steps_per_epoch(seen: Measurement) -> float | None:
    """Global steps an epoch of the training loader makes; None without one."""
    for loader in seen.facts.loaders:
        if loader.training and loader.samples and loader.batch_size:
            batches = -(-loader.samples // loader.batch_size)
            return max(batches / max(seen.anatomy.micro_batches.or_else(1.0), 1.0), 1.0)
    return None
