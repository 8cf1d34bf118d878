"""Rung 1: do both arms move the parameters alike, at the same step, from the same seed, on the same batches?

Measures, on the `main` parameters (the largest updates that together carry 95 % of |r|^2; r: update of the reference
arm, c: of the candidate):

relative error   |c - r| / |r|
cosine           c.r / (|c| |r|)
norm ratio       |c| / |r|
worst            the lowest cosine of one main parameter

The norm ratio of the first step is what shows a wrong learning rate or loss scale: rounding turns an update, and
changes the sign of single elements in Adam's first, sign-like one, but hardly its length. Small parameters are left
out because some have a true gradient of zero (the bias of a convolution before BatchNorm, of attention keys) and get
a full-size random update from Adam in any precision; they are only looked at for being `dead`: moved by the
reference, not by the candidate.

Thresholds rest on these ranges, measured on a char GPT, an LSTM, an MLP, a small conv net and a ResNet-18 of width
16 with SGD and momentum, Adam and AdamW (bf16 as autocast or emulated by rounding; float32: fused optimizers,
channels_last, parameters moved by 1e-6):

step  genuine         error          cosine    |ratio-1|  worst     nearest faults
1     optimizer only  <= 3e-7        1         0          1         no weight decay: error 0.0007 .. 0.007
1     float32         <= 0.056       >= 0.998  <= 0.0004  >= 0.997  lr x 1.02: ratio 1.020; layer dropped: worst 0.01
1     bf16            0.003 .. 0.52  >= 0.86   <= 0.014   >= 0.77   lr x 0.98: ratio 0.981; Adam eps 1e-4: ratio 0.93;
                                                                    BatchNorm frozen: cosine 0.36
2     float32         <= 0.17        >= 0.985  <= 0.014   >= 0.97   update permuted: worst about 0
2     bf16            0.002 .. 0.74  >= 0.73   <= 0.023   >= 0.52   layer dropped: worst 0.01
10    float32, tame   <= 0.034       >= 0.999  <= 0.0005  >= 0.999  optimizer state reset: error 0.88 .. 2.4
10    bf16, tame      0.002 .. 0.09  >= 0.996  <= 0.006   >= 0.99
10    ResNet, both    0.56 .. 2.0    >= 0.23   <= 0.8     >= -0.02  only gross faults can be seen

A ResNet amplifies rounding a thousandfold within three steps: channels_last in float32 is decorrelated from stock by
step 10. That is chaos, not harm, so step 2 is held to a multiple of the error of step 1, and from step 3 on
thresholds are strict only where step 2 was tame. What cannot be seen: a missing weight decay (0.7 % of the update or
less), unless the plan changes the optimizer only; in bf16, a learning rate off by less than 1 to 2 %; in training
that amplifies rounding, faults that begin after step 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from upshift.records.trial import UpdateCheck
from upshift.sites import Numerics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

#: What the plan may change: only the optimizer's arithmetic (gradients of step 1 are the same bits), the order of
#: float32 operations, or the precision of the forward and backward pass.
Precision = Literal["optimizer", "float32", "bfloat16"]

#: `UpdateCheck.worst` where neither arm moved any parameter (a learning rate of zero during warm-up).
NOTHING_MOVED = "(no parameter moved)"
#: Share of |r|^2 that the main parameters carry together.
MAIN = 0.95


class Limits(NamedTuple):
    """Largest relative error, lowest cosine (of all, of one parameter), largest factor between the norms less one."""

    error: float
    cosine: float
    worst: float
    norm: float


#: By precision and stage: the first step, the second, later ones of tame training, later ones of any.
LIMITS: dict[Precision, dict[str, Limits]] = {
    "optimizer": {
        "first": Limits(1e-4, 0.999, 0.999, 1e-4),
        "second": Limits(0.03, 0.999, 0.99, 0.01),
        "tame": Limits(0.20, 0.98, 0.9, 0.05),
        "later": Limits(math.inf, -0.5, -1.0, 3.0),
    },
    "float32": {
        "first": Limits(0.10, 0.995, 0.98, 0.004),
        "second": Limits(0.30, 0.95, 0.85, 0.05),
        "tame": Limits(0.20, 0.98, 0.9, 0.05),
        "later": Limits(math.inf, -0.5, -1.0, 3.0),
    },
    "bfloat16": {
        "first": Limits(0.70, 0.75, 0.6, 0.01),
        "second": Limits(0.95, 0.5, 0.3, 0.10),
        "tame": Limits(0.45, 0.9, 0.6, 0.10),
        "later": Limits(math.inf, -0.5, -1.0, 3.0),
    },
}
#: Relative error of step 2 at most: this times that of step 1, plus this. Amplification measured: in float32 up to 35
#: times (ResNet), in bf16, where it saturates, up to 2.5 times.
GROWTH: dict[Precision, tuple[float, float]] = {
    "optimizer": (100.0, 0.02),
    "float32": (45.0, 0.05),
    "bfloat16": (3.0, 0.10),
}
#: Relative error of step 2 below which training does not amplify rounding.
TAME: dict[Precision, float] = {"optimizer": 0.01, "float32": 0.02, "bfloat16": 0.3}
#: Part of the relative error that may show in the norm ratio of the first step in bf16.
LEAK = 0.03
#: A parameter the reference moves, with less than this part of its update left, is dead.
DEAD = 0.02


class _Measures(NamedTuple):
    """See the module; `dead` are the names of parameters the candidate alone leaves where they are."""

    error: float
    cosine: float
    norm: float
    worst: str
    worst_cosine: float
    dead: list[str]

    def within(self, limits: Limits) -> bool:
        return (
            self.error <= limits.error
            and self.cosine >= limits.cosine
            and self.worst_cosine >= limits.worst
            and 1.0 / (1.0 + limits.norm) <= self.norm <= 1.0 + limits.norm
            and not self.dead
        )


def _cosine(a: Any, b: Any) -> float:
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length > 0.0 else 0.0


def _main(power: Mapping[str, float], total: float) -> list[str]:
    """The largest that together carry `MAIN` of the whole."""
    main: list[str] = []
    for name in sorted(power, key=lambda item: -power[item]):
        main.append(name)
        if math.fsum(power[item] for item in main) >= MAIN * total:
            break
    return main


def _measure(r: Mapping[str, Any], c: Mapping[str, Any], power: Mapping[str, float], main: Sequence[str]) -> _Measures:
    rr = math.fsum(power[name] for name in main)
    cc = math.fsum(float(c[name] @ c[name]) for name in main)
    rc = math.fsum(float(r[name] @ c[name]) for name in main)
    error = math.sqrt(math.fsum(float(((c[name] - r[name]) ** 2).sum()) for name in main) / rr)
    worst = min(main, key=lambda name: _cosine(r[name], c[name]))
    typical = math.fsum(power.values()) / sum(value.size for value in r.values())
    dead = [
        name
        for name, value in r.items()
        if power[name] >= 1e-4 * typical * value.size and float(c[name] @ c[name]) < DEAD**2 * power[name]
    ]
    cosine = rc / math.sqrt(rr * cc) if cc > 0.0 else 0.0
    return _Measures(error, cosine, math.sqrt(cc / rr), worst, _cosine(r[worst], c[worst]), dead)


def apart(reference: Mapping[str, Array], candidate: Mapping[str, Array], limits: Limits) -> str:
    """Why two sets of gradients or updates of one and the same step are not alike, or the empty string.

    Args:
        reference, candidate: name -> values, any shape, float32, alike in both.
    """
    import numpy as np

    r, c = ({k: np.asarray(v, dtype=np.float64).ravel() for k, v in arm.items()} for arm in (reference, candidate))
    unlike = sorted(r.keys() ^ c.keys()) or sorted(name for name in r if r[name].shape != c[name].shape)
    if unlike:
        return f"{unlike[0]} is not alike in both arms"
    broken = [name for name, value in c.items() if np.isfinite(r[name]).all() and not np.isfinite(value).all()]
    if broken:
        return f"{broken[0]} is not finite"
    power = {name: float(value @ value) for name, value in r.items()}
    total = math.fsum(power.values())
    if not math.isfinite(total) or total == 0.0:
        return ""  # the reference itself says nothing here
    found = _measure(r, c, power, _main(power, total))
    if found.within(limits):
        return ""
    if found.dead:
        return f"{found.dead[0]} gets none"
    return (
        f"cosine {found.cosine:.4f}, norm ratio {found.norm:.4f}, error {found.error:.2g}, worst in {found.worst} "
        f"({found.worst_cosine:.4f})"
    )


def check_updates(
    step: int,
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    other_batch: Mapping[str, Array] | None,
    kind: Numerics,
    dtype_hint: Precision,
    *,
    earlier: Sequence[UpdateCheck] = (),
) -> UpdateCheck:
    """Compare the parameter updates (after - before) of one step in both arms.

    Args:
        step: 1-based global step.
        reference, candidate: name -> update, any shape, float32; large tensors may be strided subsamples, alike in
            both arms.
        other_batch: an update of the reference arm on another batch (its next step will do); shown as `noise`.
        kind: `bitwise` demands equal bits, all others go by `dtype_hint`.
        dtype_hint: the lowest precision the plan introduces.
        earlier: checks of earlier steps of the same arms. They show how much the training amplifies rounding; without
            them a step after the second is only tested for gross faults, and the second less strictly.

    Returns:
        The measures and whether they are within what precision explains. `worst` names the parameter furthest off.
    """
    import numpy as np

    def flat(update: Mapping[str, Array]) -> dict[str, Any]:
        return {name: np.asarray(value, dtype=np.float64).ravel() for name, value in update.items()}

    r, c = flat(reference), flat(candidate)
    unlike = sorted(set(r) ^ set(c)) or sorted(name for name in r if r[name].shape != c[name].shape)
    if unlike or not r:
        return _failed(step, f"{unlike[0]} (not alike in both arms)" if unlike else "(nothing to compare)")
    for arm in (r, c):
        for name, value in arm.items():
            if not np.isfinite(value).all():
                return _failed(step, f"{name} (not finite)")
    power = {name: float(value @ value) for name, value in r.items()}
    total = math.fsum(power.values())
    if total == 0.0:
        moved = [name for name, value in c.items() if value.any()]
        if moved:
            return _failed(step, f"{moved[0]} (moved by the candidate alone)")
        return UpdateCheck(step, 1.0, 1.0, 0.0, None, worst=NOTHING_MOVED, passed=True)

    main = _main(power, total)
    rr = math.fsum(power[name] for name in main)
    measures = _measure(r, c, power, main)
    error, cosine, norm, worst, worst_cosine, dead = measures
    noise = None
    if other_batch is not None:
        other = flat(other_batch)
        if all(name in other and other[name].shape == r[name].shape for name in main):
            noise = math.sqrt(math.fsum(float(((other[name] - r[name]) ** 2).sum()) for name in main) / rr)
            noise = noise if math.isfinite(noise) else None

    if kind is Numerics.BITWISE:
        passed = all(np.array_equal(r[name], c[name]) for name in r)
    else:
        stage = _stage(step, dtype_hint, earlier)
        limits = LIMITS[dtype_hint][stage]
        allowed, factor = limits.error, limits.norm
        if stage == "first" and dtype_hint == "bfloat16":
            factor += LEAK * error
        first = [check for check in earlier if check.step == 1 and check.worst != NOTHING_MOVED]
        if stage == "second" and first:
            times, plus = GROWTH[dtype_hint]
            allowed = min(allowed, times * first[0].relative_error + plus)
        passed = measures.within(Limits(allowed, limits.cosine, limits.worst, factor))
    if dead:
        worst, worst_cosine = dead[0], _cosine(r[dead[0]], c[dead[0]])
    return UpdateCheck(
        step=step,
        cosine=cosine,
        norm_ratio=norm,
        relative_error=error,
        noise=noise,
        worst=worst,
        worst_cosine=worst_cosine,
        passed=passed,
    )


def _stage(step: int, precision: Precision, earlier: Sequence[UpdateCheck]) -> str:
    if step <= 2:
        return "first" if step <= 1 else "second"
    known = [check for check in earlier if 2 <= check.step < step and check.worst != NOTHING_MOVED]
    return "tame" if known and all(check.relative_error <= TAME[precision] for check in known) else "later"


def _failed(step: int, worst: str) -> UpdateCheck:
    """A comparison that could not even be made."""
    return UpdateCheck(step, 0.0, 0.0, 1.0, None, worst=worst, worst_cosine=0.0, passed=False)
