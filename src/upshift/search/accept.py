"""The acceptance rule: what the evidence about one plan, against stock, adds up to.

Which evidence is owed depends on what the plan does to the numbers (the weakest kind among its techniques):

kind               passes when                                                        rung
bitwise            losses and final parameters are identical                          bitwise
rounding           every update check passed and the upper bound of the lag <= 1 %    trajectory
reseeds            the same, the bound being the seed-to-seed spread where known      trajectory
changes_training   never here: it needs the user's metric                             none

Between `trajectory` and rejection stands `update`: the updates agree, and the curves cannot tell. It passes with
`weaker` saying why, and the caller compares the rung with the one required:

- the horizon was too short or the curve flat, and no harm was seen;
- several optimizers work against one another, so that no single loss has to fall.

Shown harm rejects: a lower bound of the lag above zero together with an upper bound above the margin (whatever is
left of the interval, a lag is there and it may be too large), a planned loss far above stock's next to the spread from
batch to batch, on a flat curve a clearly higher planned loss, a planned loss that is not finite. For one shape of
D(t) = planned - stock, more of it moves the verdict only from `trajectory` over `update` to rejection. So does a
plan that clearly learns faster per step than stock, since rounding does not explain it: dropout was lost, or the loss
is another one. Where seeds differ, or the training amplifies rounding, that is only said. Losses that never change
show nothing, even where they are identical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from upshift.measure.lag import MARGIN, LagResult
from upshift.measure.updates import NOTHING_MOVED
from upshift.records.trial import Proof, Rung, UpdateCheck
from upshift.sites import Numerics

#: A planned loss higher on average than stock by this part of the spread from batch to batch is harm, even where
#: the interval of the lag is too wide to say so. (The means of two unrelated runs over 67 steps differ with a standard
#: deviation of a sixth of that spread.)
FAR = 0.5
#: Updates further apart than this after the first step compare two trajectories, not one computation.
WILD = 0.5
#: On a flat curve: a planned loss higher by this share of the starting loss is harm.
FLAT_MARGIN = 0.005
#: A lag, of either sign, that is not shown to be there, but is no evidence of its absence either.
TOO_FAR = 0.05
#: A loss that is too good belongs to another training, or is not the same loss.
UNEXPLAINED = "the loss falls faster per step than stock, which rounding does not explain"


#: Another random stream: two seeds of a small GPT lay 5 % of lag apart. A loss that falls faster by twice that is what
#: randomness left out looks like (a random transform cached); five times that, in either direction, shows nothing.
STREAM, STREAM_FAR = 0.10, 0.25


def accept(
    numerics: Numerics,
    *,
    bitwise_equal: bool | None,
    updates: Sequence[UpdateCheck],
    lag: LagResult | None,
    losses_seen: bool,
    several_optimizers: bool = False,
    seed_spread: float | None = None,
    has_dropout: bool = False,
) -> Proof:
    """Whether a plan may be kept, and on what evidence.

    Args:
        numerics: the weakest kind among the techniques of the plan.
        bitwise_equal: losses of the whole trial and final parameters are identical; None where not compared.
        updates: checks of rung 1, at different steps.
        lag: of the paired losses; None where there are none to pair.
        losses_seen: a loss was seen in both arms.
        several_optimizers: more than one optimizer per global step (a GAN).
        seed_spread: lag between two seeds of stock (fraction). For `reseeds` it widens the margin; for `rounding` it
            only keeps a lag inside it from being called harm, where the training amplifies rounding.
        has_dropout: the model draws random masks while training.

    Returns:
        A `Proof`. Rejected ones have rung `none`, whatever was reached before, so that nothing reads them as evidence.
    """
    weaker: list[str] = []
    if has_dropout and numerics is not Numerics.BITWISE:
        weaker.append("updates were compared with dropout off")

    def proof(rung: Rung, passed: bool, reason: str) -> Proof:
        return Proof(
            rung=rung if passed else "none",
            passed=passed,
            reason=reason,
            steps=lag.steps if lag else 0,
            lag=lag.lag if lag else None,
            lag_high=lag.high if lag else None,
            smallest_lag=lag.smallest if lag else None,
            updates=tuple(updates),
            bitwise=bitwise_equal,
            weaker="; ".join(weaker) if passed else "",
        )

    if numerics is Numerics.CHANGES_TRAINING:
        return proof("none", False, "it changes the training itself: only a metric on whole runs can accept it")
    if not losses_seen:
        return proof("none", False, "not shown: no loss was seen")
    if lag is not None and not lag.finite:
        return proof("none", False, "the planned loss is not finite")
    failed = [check for check in updates if not check.passed]
    if failed:
        first = failed[0]
        return proof(
            "none",
            False,
            f"the updates of step {first.step} differ more than precision explains: cosine {first.cosine:.4f}, norm "
            f"ratio {first.norm_ratio:.4f}, worst in {first.worst or 'no single parameter'}",
        )
    if numerics is Numerics.BITWISE:
        if bitwise_equal:
            return proof("bitwise", True, "losses and final parameters are identical")
        said = "not shown: bits were not compared" if bitwise_equal is None else "not identical to stock"
        return proof("none", False, said)
    if bitwise_equal:
        return proof("bitwise", True, "losses and final parameters are identical")
    if not any(check.worst != NOTHING_MOVED for check in updates):
        return proof("none", False, "not shown: no parameter update was compared")
    wild = [check.step for check in updates if check.step >= 2 and check.relative_error > WILD]
    if wild:
        weaker.append(f"the training amplifies rounding: from step {min(wild)} on the updates say little")
    if several_optimizers:
        weaker.append("several optimizers: no single loss has to fall, so the trajectory proves little")
        return proof("update", True, "updates agree")
    if lag is None:
        weaker.append("no paired losses")
        return proof("update", True, "updates agree")
    return _by_lag(
        lag,
        reseeds=numerics is Numerics.RESEEDS,
        wild=bool(wild),
        seed_spread=seed_spread,
        weaker=weaker,
        proof=proof,
    )


def _by_lag(
    lag: LagResult,
    *,
    reseeds: bool,
    wild: bool,
    seed_spread: float | None,
    weaker: list[str],
    proof: Callable[[Rung, bool, str], Proof],
) -> Proof:
    """The verdict of the trajectory, all update checks having passed. `wild`: rounding alone decorrelates the arms."""
    spread = seed_spread if seed_spread is not None and math.isfinite(seed_spread) else 0.0
    allowed = max(MARGIN, spread) if reseeds else MARGIN
    if reseeds:
        weaker.append("another random stream: the curves differ as those of two seeds do")
    if lag.identical and lag.flat:
        weaker.append("the loss never changes, so the curves show nothing")
        return proof("update", True, "updates agree")
    if lag.identical:
        return proof("trajectory", True, "losses are identical")
    if lag.excess is None:
        return proof("none", False, f"not shown: {lag.reason or 'the stock losses are all zero'}")
    far = lag.noise is not None and lag.excess > FAR * lag.noise
    if lag.lag is None or lag.low is None or lag.high is None:
        # Without a falling stock curve there is no lag, but a planned curve that lies above it is harm all the same.
        sure = lag.excess_low is not None and lag.excess_low > FLAT_MARGIN
        if lag.excess > FLAT_MARGIN and (far or sure):
            return proof("none", False, f"the planned loss is higher by {lag.excess:.2%} of the starting loss")
        # The bounds of a mean lie alike on both sides of it.
        better = lag.excess_low is not None and 2.0 * lag.excess - lag.excess_low < -FLAT_MARGIN
        if better and not (reseeds or wild):
            return proof("none", False, f"not shown: {UNEXPLAINED}: lower by {-lag.excess:.2%} of the starting loss")
        weaker.append(lag.reason)
        return proof("update", True, f"updates agree; {lag.reason}")
    if lag.high < 0.0 and lag.lag < -MARGIN and not (reseeds or wild):
        return proof("none", False, f"not shown: {UNEXPLAINED}: lag {lag.lag:+.2%}, at most {lag.high:+.2%}")
    if reseeds and lag.high < -MARGIN and lag.lag < -max(STREAM, spread):
        why = "the loss falls faster per step than another random stream explains"
        return proof("none", False, f"not shown: {why}: lag {lag.lag:+.2%}, at most {lag.high:+.2%}")
    if lag.high < -MARGIN:
        weaker.append(f"the loss falls faster per step than stock (lag {lag.lag:+.2%})")
    if lag.high <= allowed:
        return proof("trajectory", True, f"lag {lag.lag:+.2%}, at most {lag.high:+.2%} in {lag.steps} steps")
    if reseeds or wild:
        # Two seeds of one and the same training lie apart: there, a lag other than zero is not yet harm.
        harm = lag.low > max(MARGIN, spread)
    else:
        harm = lag.low > 0.0 or (lag.excess_low is not None and lag.excess_low > 0.0)
    if harm:
        return proof("none", False, f"it needs more steps: lag {lag.lag:+.2%}, {lag.low:+.2%} to {lag.high:+.2%}")
    if far and lag.lag > max(allowed, spread if wild else 0.0):
        return proof("none", False, f"the planned loss is far higher: lag {lag.lag:+.2%}, up to {lag.high:+.2%}")
    if abs(lag.lag) > (max(STREAM_FAR, 2.0 * spread) if reseeds else TOO_FAR) and not wild:
        return proof(
            "none", False, f"not shown: lag {lag.lag:+.2%} in {lag.steps} steps, too few to exclude or show it"
        )
    smallest = f"{lag.smallest:.2%}" if lag.smallest is not None else "more"
    few = f"{lag.steps} steps are too few for the curves"
    weaker.append(f"{few}: the smallest lag they could have shown is {smallest}")
    return proof("update", True, f"updates agree; lag {lag.lag:+.2%}, compatible with none")
