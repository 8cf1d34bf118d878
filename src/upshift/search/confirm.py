"""Confirmation: two fresh processes, stock against the plan. Their steps are the timing and the proof at once.

Order of cost: updates of the first steps first, since a failure there ends it; then the alternation; then what the
losses and, for bitwise plans, the parameters say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from upshift.measure.band import band_of
from upshift.measure.lag import lag
from upshift.measure.pace import pace_of
from upshift.measure.paired import Sequential
from upshift.measure.updates import Precision, check_updates
from upshift.records import Pairing, Proof
from upshift.records.plan import Pace
from upshift.records.trial import UpdateCheck
from upshift.search.accept import accept
from upshift.search.alike import parted
from upshift.search.duel import Arm, ArmPlan, Duel, Ended
from upshift.search.late import Late, late_step
from upshift.search.screening import compare_live, one_off_seconds, with_epochs, within_reach
from upshift.sites import Numerics

#: Steps after which both arms have made all the updates that are compared.
UPDATE_STEPS = 12
#: Steps whose update is checked, and the step whose update stands for another mini-batch.
CHECKED = ((1, 2), (2, 3), (10, 11))


@dataclass
class Confirmation:
    """What came of stock against a plan."""

    decision: str
    pairing: Pairing | None
    proof: Proof
    one_off: float = 0.0
    attribution: dict[str, Pairing] = field(default_factory=dict)
    no_effect: dict[str, str] = field(default_factory=dict)
    stock_step: float = 0.0
    isolation: str = ""
    ended: bool = False
    pace: Pace | None = None
    held: int = 0
    """The most bytes the planned arm held, and the reference."""
    reference_held: int = 0


def updates_of(folder: Path, step: int) -> dict[str, Any] | None:
    """The updates a child wrote for a step, or None where it wrote none."""
    import numpy

    file = folder / f"update-{step}.npz"
    if not file.exists():
        return None
    with numpy.load(file, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def same_start(a: Path, b: Path) -> bool:
    """Whether both arms began from the same parameters; otherwise nothing can be paired."""
    import numpy

    first, second = updates_of(a, 1), updates_of(b, 1)
    if first is None or second is None:
        return False
    names = [name for name in first if name.startswith("start:")]
    if set(names) != {name for name in second if name.startswith("start:")}:
        return False
    return all(bool(numpy.array_equal(first[name], second[name], equal_nan=True)) for name in names)


def check_all(a: Path, b: Path, kind: Numerics, precision: Precision) -> list[UpdateCheck]:
    """Compare the updates of the steps both arms recorded."""
    found: list[UpdateCheck] = []
    for step, other in CHECKED:
        first, second, noise = updates_of(a, step), updates_of(b, step), updates_of(a, other)
        if first is None or second is None:
            continue
        plain = [{k: v for k, v in item.items() if not k.startswith("start:")} for item in (first, second)]
        found.append(check_updates(step, plain[0], plain[1], noise, kind, precision, earlier=tuple(found)))
    return found


def confirm(
    make: Callable[[], Duel],
    plan: ArmPlan,
    seconds: float,
    *,
    numerics: Numerics,
    precision: Precision,
    live: Mapping[str, bool],
    has_dropout: bool,
    rescaled: bool = False,
    steps_per_epoch: float | None,
    fills: bool,
    targets: frozenset[str],
    say: Callable[[str], None],
    attribute_seconds: float = 0.0,
    reference: ArmPlan | None = None,
) -> Confirmation:
    """Run stock and plan side by side for about `seconds` and judge speed and quality.

    Args:
        reference: what stands for stock where the untouched script cannot run; None: the untouched script.
        numerics: the weakest kind among the techniques of the plan.
        precision: the coarsest among the techniques of the plan: what the updates may differ by.
        live: technique -> whether it can be switched off alone, for leave-one-out attribution.
        rescaled: the script scales its loss by a factor that changes (a GradScaler).
        targets: phases the techniques of the plan act on.
        fills: whether the plan holds a technique that needs an epoch to reach its steady state.

    Raises:
        ArmFailed: an arm crashed or hung.
    """
    duel = make()
    began = time.monotonic()
    try:
        say(f"confirmation: starting {'the plan it is compared with' if reference else 'the untouched script'}")
        a = duel.start(dict(reference or {}), options={"updates": True})
        say("confirmation: starting the planned script")
        b = duel.start(plan, options={"updates": True})
        ended = False
        decision, pairing = "no change", None
        rejected = False
        checks: list[UpdateCheck] = []
        try:
            duel.level(UPDATE_STEPS)
            checks = check_all(a.child.record, b.child.record, numerics, precision)
            paired = same_start(a.child.record, b.child.record)
            rejected = any(not item.passed for item in checks) or not paired
            if not rejected:
                if fills and steps_per_epoch:
                    say("confirmation: one epoch, so that the cache is full")
                    duel.level(int(steps_per_epoch) + 4, chunk=50, stop=lambda: time.monotonic() - began > 4 * seconds)
                one_off = one_off_seconds(a, b)

                def shown(sequential: Sequential, elapsed: float) -> None:
                    say(f"confirmation: {len(sequential.quads)} quads, {elapsed:.0f} of {seconds:.0f} s")

                decision, pairing = duel.fight(seconds, on_quad=shown, decide=False)
                ended = duel.ended
            else:
                one_off = 0.0
        except Ended:
            ended = True
            paired = same_start(a.child.record, b.child.record)
            checks = checks or check_all(a.child.record, b.child.record, numerics, precision)
            one_off = one_off_seconds(a, b)
        if pairing is not None:
            pairing = within_reach(with_epochs(pairing, a, b, steps_per_epoch), a, targets)
            if decision == "faster" and pairing.low <= 1.01:
                decision = "no change"
        # Before the late step and the attribution, which are no steps of a run.
        from_step = UPDATE_STEPS + int(steps_per_epoch or 0) if fills else 0
        pace = pace_of(list(b.seconds.values())[max(from_step, UPDATE_STEPS) :], from_step=from_step)
        proof = judge(duel, a, b, numerics=numerics, checks=checks, paired=paired, has_dropout=has_dropout, ended=ended)
        if proof.passed and numerics is Numerics.ROUNDING and proof.rung != "bitwise" and not (ended or rescaled):
            say("confirmation: one late step from the same state")
            proof = after_late_step(proof, late_step(duel, a, b, precision))
        proof = with_band(proof, several=max(a.optimizers, b.optimizers) > 1, rescaled=rescaled, dropout=has_dropout)
        attribution: dict[str, Pairing] = {}
        if decision == "faster" and proof.passed and not ended and attribute_seconds > 0:
            attribution = attribute(duel, b, plan, live, attribute_seconds, say)
        return Confirmation(
            decision=decision,
            pairing=pairing,
            proof=proof,
            one_off=one_off,
            attribution=attribution,
            no_effect={name: text for name, text in b.no_effect().items() if name in plan},
            stock_step=duel.step(0),
            isolation=a.isolation,
            ended=ended,
            pace=pace,
            held=duel.held(b),
            reference_held=duel.held(a),
        )
    finally:
        duel.close()


def after_late_step(proof: Proof, late: Late) -> Proof:
    """The proof; rejected where a step late in training went wrong, labelled where none was made."""
    if late.problem:
        return msgspec.structs.replace(proof, rung="none", passed=False, reason=late.problem)
    if late.unseen:
        weaker = "; ".join(text for text in (proof.weaker, f"no late step was compared: {late.unseen}") if text)
        return msgspec.structs.replace(proof, weaker=weaker)
    return proof


def with_band(proof: Proof, *, several: bool, rescaled: bool, dropout: bool) -> Proof:
    """The proof with what the guard of the real run holds its losses against, or why there is nothing."""
    if several:
        return msgspec.structs.replace(proof, no_band="several optimizers: no single loss has to fall")
    if rescaled:
        return msgspec.structs.replace(proof, no_band="a GradScaler changes the scale of the loss")
    # Dropout is off while the updates are compared: those losses are lower than a run's.
    band, reason = band_of(proof.stock_losses, skip=UPDATE_STEPS if dropout else 0)
    return msgspec.structs.replace(proof, band=band, no_band=reason)


def judge(
    duel: Duel,
    a: Arm,
    b: Arm,
    *,
    numerics: Numerics,
    checks: list[UpdateCheck],
    paired: bool,
    has_dropout: bool,
    ended: bool,
) -> Proof:
    """The proof: from losses step by step, the updates, and for bitwise plans the final parameters."""
    if not paired:
        return Proof(
            rung="none",
            passed=False,
            reason="the two runs did not start from the same parameters; seed the script to make proof possible",
        )
    apart = parted(a, b, numerics)
    if apart:
        return Proof(rung="none", passed=False, reason=apart, updates=tuple(checks))
    common = sorted(set(a.losses) & set(b.losses))
    stock = [value for i in common if (value := a.step_loss(i)) is not None]
    planned = [value for i in common if (value := b.step_loss(i)) is not None]
    if len(stock) != len(planned):
        stock, planned = [], []
    bitwise: bool | None = None
    if numerics in (Numerics.BITWISE, Numerics.RESEEDS) and stock:
        bitwise = all(a.losses[i] == b.losses[i] for i in common)
        if bitwise and not ended and a.steps == b.steps:
            first = duel.ask(a, {"kind": "digest"}, "digest")["sha256"]
            bitwise = first == duel.ask(b, {"kind": "digest"}, "digest")["sha256"]
        elif bitwise and min(stock) == max(stock):
            bitwise = None  # losses that never change say nothing without the parameters
    proof = accept(
        numerics,
        bitwise_equal=bitwise,
        updates=checks,
        lag=lag(stock, planned) if stock else None,
        losses_seen=bool(stock),
        several_optimizers=max(a.optimizers, b.optimizers) > 1,
        seed_spread=None,
        has_dropout=has_dropout,
    )
    return msgspec.structs.replace(proof, stock_losses=tuple(stock), planned_losses=tuple(planned))


def attribute(
    duel: Duel, b: Arm, plan: ArmPlan, live: Mapping[str, bool], seconds: float, say: Callable[[str], None]
) -> dict[str, Pairing]:
    """Leave-one-out: the whole plan against the plan without one technique, for those that switch live."""
    found: dict[str, Pairing] = {}
    names = [name for name in plan if live.get(name)]
    for name in names:
        say(f"attribution: the plan without {name}")
        try:
            _, pairing = compare_live(
                duel, b, [item for item in plan if item != name], list(plan), max(seconds / len(names), 4.0)
            )
        except Ended:
            break
        if pairing is not None:
            found[name] = pairing
    return found
