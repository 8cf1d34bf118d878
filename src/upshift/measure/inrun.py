"""Is a technique that alternates inside a real run harmless? Judged on that run's own steps.

Three looks, from sharp to blunt; every one of them must be passed.

replayed   Between two steps the last batch goes once more through the model without and with the technique, from the
           same parameters, buffers and random state, with the same gradient of the loss with respect to the output.
           What comes out, every parameter's gradient, and the update that the optimizer makes of one and the same
           gradient are compared. This is paired, so its limits are tight. The arithmetic of the loss, between the
           model and the backward pass, is not in it.
norms      The norm of every parameter's gradient as the optimizer got it in the real steps, with against without.
losses     The loss of the real steps, with against without.

The last two are not paired: steps have batches of their own. Inside an ABBA quad a drift cancels, as for times; the
quad's difference is the unit, with Student's t. Where its interval is too wide to exclude the margin, nothing is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from upshift.measure.stats import t_quantile
from upshift.measure.updates import NOTHING_MOVED, Precision, check_updates
from upshift.sites import Numerics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

#: One-sided error of each unpaired look: to call a difference one, and to call it excluded. The first is small: an
#: honest technique that is turned down is lost for the run, and the replayed batches are the sharper look.
ALPHA_SEEN, ALPHA_EXCLUDED = 0.0005, 0.005
#: Norms of gradients may differ by this factor less one: what is called a difference, and what must be excluded.
NORM_SEEN, NORM_EXCLUDED = 0.05, 0.3
#: The same of the loss, as shares of its level.
LOSS_SEEN, LOSS_EXCLUDED = 0.02, 0.3

#: Replayed: relative error of the output, and of each single parameter's gradient the largest factor between the norms
#: less one and the lowest cosine. Stated, not calibrated, except that honest techniques pass in the tests.
OUTPUT: dict[Precision, float] = {"optimizer": 1e-5, "float32": 1e-3, "bfloat16": 0.1}
EACH: dict[Precision, tuple[float, float]] = {
    "optimizer": (1e-3, 0.9999),
    "float32": (0.02, 0.99),
    "bfloat16": (0.25, 0.8),
}
#: Parameters whose gradient carries less than this part of the typical power are rounding noise, or nearly.
NOISE = 1e-4

Answer = Literal["alike", "apart", "not shown"]


class Judged(NamedTuple):
    """An answer with its reason."""

    answer: Answer
    reason: str


class Sample(NamedTuple):
    """What one step of a complete quad showed. `norms` of the gradients, one per parameter; empty if not seen."""

    quad: int
    with_it: bool
    loss: float | None
    norms: Sequence[float]


class Replayed(NamedTuple):
    """One batch replayed in one arm: name -> values (large tensors as alike subsamples)."""

    outputs: Mapping[str, Array]
    gradients: Mapping[str, Array]
    stepped: Mapping[str, Array]
    """Gradients as the optimizer got them, after the technique has had its turn before the step."""
    updates: Mapping[str, Array]
    rounding: Mapping[str, Array]
    """What two roundings of a parameter may make of the difference between two updates."""


class Differences(NamedTuple):
    """Where two replays of one batch differ most."""

    reason: str
    """Why they are not the same computation; empty where they are."""
    gradient: float
    """Relative error of the gradients."""
    update: float
    """Relative error of the optimizer's update."""


def compare_replays(reference: Replayed, candidate: Replayed, kind: Numerics, precision: Precision) -> Differences:
    """Hold a replay with the technique against one without it.

    Args:
        kind: `bitwise` demands equal bits.
        precision: what the technique may round to.
    """
    import numpy as np

    updates = dict(candidate.updates)
    if kind is not Numerics.BITWISE:
        # Late in training an update is a few units in the last place of its parameter.
        for name in set(updates) & set(reference.updates):
            stock, ours = reference.updates[name], updates[name]
            updates[name] = np.where(np.abs(ours - stock) <= reference.rounding[name], stock, ours)
    reason = _output_apart(reference.outputs, candidate.outputs, kind, precision)
    errors = []
    for what, r, c in (
        ("gradient", reference.gradients, candidate.gradients),
        ("gradient before the step", reference.stepped, candidate.stepped),
        ("update", reference.updates, updates),
    ):
        if not r or set(r) != set(c):
            return Differences(reason or f"not every {what} could be compared", math.inf, math.inf)
        check = check_updates(1, r, c, None, kind, precision)
        errors.append(check.relative_error)
        if check.worst == NOTHING_MOVED:
            reason = reason or f"every {what} was zero, which shows nothing"
        elif not check.passed:
            reason = reason or (
                f"the {what} differs: relative error {check.relative_error:.2g}, norm {check.norm_ratio:.3g} times, "
                f"furthest off {check.worst}"
            )
        elif what != "update" and (name := _one_apart(r, c, precision)):
            reason = reason or f"the {what} of {name} differs"
    return Differences(reason, max(errors[0], errors[1]), errors[2])


def as_random(with_dropout: tuple[Replayed, Replayed], without: tuple[Replayed, Replayed]) -> bool:
    """Whether dropout moves the output by as much with the technique as without it, where the masks differ.

    Args:
        with_dropout, without: replays of one batch, reference and candidate, with dropout and with dropout off.
    """
    moved = [_distance(with_dropout[arm].outputs, without[arm].outputs) for arm in (0, 1)]
    return moved[0] > 0.0 and 0.5 <= moved[1] / moved[0] <= 2.0


def _distance(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    import numpy as np

    return math.sqrt(math.fsum(float(np.sum((a[name] - b[name]) ** 2)) for name in a))


def _output_apart(r: Mapping[str, Array], c: Mapping[str, Array], kind: Numerics, precision: Precision) -> str:
    import numpy as np

    if not r or set(r) != set(c):
        return "the model's output has another form"
    for name, value in r.items():
        other = c[name]
        if other.shape != value.shape:
            return "the model's output has another shape"
        if kind is Numerics.BITWISE:
            if not np.array_equal(value, other):
                return "the model's output is not the same bits"
            continue
        size = float(np.linalg.norm(value))
        error = float(np.linalg.norm(other - value))
        if not error <= OUTPUT[precision] * size:
            return f"the model's output differs: relative error {error / size if size else math.inf:.2g}"
    return ""


def _one_apart(r: Mapping[str, Array], c: Mapping[str, Array], precision: Precision) -> str:
    """The first parameter whose own gradient differs in length or direction, however small its part in the whole."""
    import numpy as np

    power = {name: float(np.vdot(value, value)) for name, value in r.items()}
    typical = math.fsum(power.values()) / sum(value.size for value in r.values())
    factor, least = EACH[precision]
    for name, value in r.items():
        other = c[name]
        if power[name] < NOISE * typical * value.size:
            continue
        length = math.sqrt(float(np.vdot(other, other)) / power[name])
        cosine = float(np.vdot(value, other)) / (power[name] * length) if length else 0.0
        if not (1.0 / (1.0 + factor) <= length <= 1.0 + factor and cosine >= least):
            return f"{name} ({length:.3g} times as long, cosine {cosine:.3f})"
    return ""


def judge_losses(samples: Sequence[Sample]) -> Judged:
    """Whether the losses of steps with the technique are those of steps without it."""
    values = [(item, item.loss) for item in samples if item.loss is not None]
    if any(not math.isfinite(loss) for _, loss in values):
        return Judged("apart", "a loss was not finite")
    level = _mean([loss for item, loss in values if not item.with_it])
    quads = _quads([(item.quad, item.with_it, loss) for item, loss in values])
    if level is None or len(quads) < 4:
        return Judged("not shown", "too few losses were seen")
    scale = abs(level)
    if _apart(quads, LOSS_SEEN * scale):
        return Judged("apart", f"the loss of steps with it is {_mean(quads) or 0.0:+.3g} off, of {level:.4g}")
    low, high = _interval(quads, ALPHA_EXCLUDED)
    if max(-low, high) > LOSS_EXCLUDED * scale:
        return Judged("not shown", "the losses scatter too much to be compared")
    return Judged("alike", f"loss {low / scale:+.1%} to {high / scale:+.1%}" if scale else "loss the same")


def judge_norms(samples: Sequence[Sample], names: Sequence[str]) -> Judged:
    """Whether the gradients of steps with the technique are as long as those of steps without it.

    Args:
        names: of the parameters, in the order of the norms.
    """
    seen = [item for item in samples if item.norms]
    if not seen or any(len(item.norms) != len(names) for item in seen):
        return Judged("not shown", "the gradients could not be seen before the optimizer's steps")
    if any(not math.isfinite(value) for item in seen for value in item.norms):
        return Judged("apart", "a gradient was not finite")
    whole = _quads([(item.quad, item.with_it, math.log(math.hypot(*item.norms) or 1e-300)) for item in seen])
    if len(whole) < 4:
        return Judged("not shown", "too few gradients were seen")
    for index in range(len(names)):
        off = [item.norms[index] for item in seen if not item.with_it]
        on = [item.norms[index] for item in seen if item.with_it]
        if sum(value > 0.0 for value in off) > len(off) / 2 and not any(on):
            return Judged("apart", f"{names[index]} has no gradient with it")
        if not all(off) or not all(on):
            continue  # rows that are not in every batch
        logs = _quads([(item.quad, item.with_it, math.log(item.norms[index])) for item in seen])
        if _apart(logs, math.log1p(NORM_SEEN), ALPHA_SEEN / len(names)):
            factor = math.exp(_mean(logs) or 0.0)
            return Judged("apart", f"the gradient of {names[index]} is {factor:.2f} times as long with it")
    if _apart(whole, math.log1p(NORM_SEEN)):
        return Judged("apart", f"the gradient is {math.exp(_mean(whole) or 0.0):.2f} times as long with it")
    low, high = _interval(whole, ALPHA_EXCLUDED)
    if max(-low, high) > math.log1p(NORM_EXCLUDED):
        return Judged("not shown", "the norms of the gradients scatter too much to be compared")
    return Judged("alike", f"gradient norm {math.exp(low):.2f} to {math.exp(high):.2f} times")


def _quads(values: Sequence[tuple[int, bool, float]]) -> list[float]:
    """With less without, one value per quad that has both."""
    result = []
    for quad in sorted({number for number, _, _ in values}):
        on = _mean([value for number, with_it, value in values if number == quad and with_it])
        off = _mean([value for number, with_it, value in values if number == quad and not with_it])
        if on is not None and off is not None:
            result.append(on - off)
    return result


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _interval(values: Sequence[float], alpha: float) -> tuple[float, float]:
    n = len(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = t_quantile(1.0 - alpha, n - 1) * error
    return mean - half, mean + half


def _apart(values: Sequence[float], margin: float, alpha: float = ALPHA_SEEN) -> bool:
    """Whether zero is excluded, and the middle lies beyond what is allowed."""
    low, high = _interval(values, alpha)
    return (low > 0.0 or high < 0.0) and abs(low + high) / 2.0 > margin
