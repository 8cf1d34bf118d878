"""Rung 1: do both arms move the parameters alike, at the same step, from the same seed, on the same batches?

Measures, on the `main` parameters (the largest updates that together carry 95 % of |r|^2; r: update of the reference
arm, c: of the candidate):

relative error   |c - r| / |r|
cosine           c.r / (|c| |r|)
norm ratio       |c| / |r|
scale            the smaller of | |c| / |r| - 1 | and | c.r / |r|^2 - 1 |
worst            the lowest cosine of one main parameter

`scale` takes the smaller of two because each is blind to one kind of harmless rounding: independent rounding
lengthens c (not its projection), and Adam's first, sign-like update loses projection where tiny gradients change sign
(not length). A wrong learning rate or loss scale moves both. Small parameters are left out because some have a true
gradient of zero (the bias of a convolution before BatchNorm, of attention keys) and get a full-size random update
from Adam in any precision; they are only looked at for being `dead`: moved by the reference, not by the candidate.

Thresholds rest on these ranges, measured on a char GPT, an LSTM, an MLP, a small conv net and a ResNet-18 of width
16 with SGD and momentum, Adam and AdamW (bf16 as autocast or emulated by rounding; float32: fused optimizers,
channels_last, parameters moved by 1e-6):

step  genuine                error          cosine      scale         worst   faults nearest to it
1     float32              1e-7 .. 0.056     >= 0.998    <= 0.0004    >= 0.997  lr x 1.02: scale 0.020; layer dropped: worst 0.01
1     bf16                0.003 .. 0.52      >= 0.86     <= 0.014     >= 0.77   lr x 0.98: scale 0.019; Adam eps 1e-4: 0.065; BatchNorm
                                                                              frozen: cosine 0.36; gradient noise 0.5: cosine 0.36 .. 0.90
2     float32              3e-7 .. 0.17      >= 0.985    <= 0.013     >= 0.97   update permuted: worst about 0
2     bf16                0.002 .. 0.74      >= 0.73     <= 0.021     >= 0.62   layer dropped: worst 0.01
10    float32, tame        4e-7 .. 0.034     >= 0.999    <= 0.0005    >= 0.999  optimizer state reset: error 0.88 .. 2.4
10    bf16, tame          0.002 .. 0.09      >= 0.996    <= 0.006     >= 0.99
10    ResNet, both         0.56 .. 2.0       >= 0.23     <= 0.77      >= -0.02  (nothing but gross faults can be seen)

A ResNet amplifies rounding a thousandfold within three steps: channels_last in float32 is decorrelated from stock by
step 10. That is chaos, not harm, so from step 3 on thresholds are strict only where step 2 was tame. What cannot
be seen in bf16: a missing weight decay (0.7 % of the update or less), a scale off by less than 1 to 2 %.
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

Precision = Literal["float32", "bfloat16"]

#: `UpdateCheck.worst` where neither arm moved any parameter (a learning rate of zero during warm-up).
NOTHING_MOVED = "(no parameter moved)"
#: Share of |r|^2 that the main parameters carry together.
MAIN = 0.95


class Limits(NamedTuple):
    """Largest relative error, lowest cosine (of all, of one parameter), largest scale error and norm factor."""

    error: float
    cosine: float
    worst: float
    scale: float
    norm: float


#: By precision and stage: the first step, the second, later ones of tame training, later ones of any.
LIMITS: dict[Precision, dict[str, Limits]] = {
    "float32": {
        "first": Limits(0.10, 0.995, 0.98, 0.004, 1.02),
        "second": Limits(0.30, 0.95, 0.85, 0.05, 1.1),
        "tame": Limits(0.20, 0.98, 0.9, 0.05, 1.1),
        "later": Limits(math.inf, -1.0, -1.0, math.inf, 4.0),
    },
    "bfloat16": {
        "first": Limits(0.70, 0.75, 0.6, 0.01, 1.1),
        "second": Limits(0.95, 0.5, 0.3, 0.10, 1.2),
        "tame": Limits(0.45, 0.9, 0.6, 0.10, 1.2),
        "later": Limits(math.inf, -1.0, -1.0, math.inf, 4.0),
    },
}
#: Relative error of step 2 below which training does not amplify rounding.
TAME = {"float32": 0.05, "bfloat16": 0.3}
