"""What a search comes to, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from upshift.records import Measurement, Trial
from upshift.search.confirm import Confirmation

if TYPE_CHECKING:
    from upshift.search.autopilot import Outcome


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
