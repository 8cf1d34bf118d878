"""Did both arms do the same work? What no technique may change, whatever it says about its numerics.

Speed that comes from less work is none: a smaller batch, shorter sequences, micro-batches left out, an epoch cut
short. Such a plan can train almost as well as stock over a few hundred steps, so the updates and the curves need not
show it. Its first loss, its epochs and its backward passes do.
"""

from __future__ import annotations

import math

from upshift.search.duel import Arm
from upshift.sites import Numerics

#: The first loss, of the same parameters on the same batch, may differ by this share. Measured: bfloat16 at most
#: 0.0009 (ResNet-18 of width 16; the others 0.0001), float32 in another order 0.0000002; frozen BatchNorm 0.022.
FIRST_LOSS = 0.005
FIRST_STEPS = 12


def parted(a: Arm, b: Arm, numerics: Numerics) -> str:
    """What the candidate (`b`) did otherwise than the reference (`a`) although no plan may, or the empty string."""
    common = a.seconds.keys() & b.seconds.keys()
    starts = [sorted(step + 1 for step, _ in arm.epoch_starts if step in common) for arm in (a, b)]
    if starts[0] != starts[1]:
        step = min(set(starts[0]) ^ set(starts[1]))
        return f"not the same work: an epoch starts at step {step} in one run only"
    for step in sorted(common):
        if a.backwards[step] != b.backwards[step]:
            return (
                f"not the same work: step {step + 1} showed {b.backwards[step]} losses at backward calls, "
                f"{a.backwards[step]} in the untouched script"
            )
    # Another random stream may draw another first batch.
    if numerics is not Numerics.RESEEDS and a.losses.get(0) and b.losses.get(0):
        stock, planned = a.losses[0][0], b.losses[0][0]
        # A difference of two large numbers may be small by chance: the size is that of the first steps.
        size = max(abs(value) for step in range(FIRST_STEPS) for value in a.losses.get(step, ()))
        if math.isfinite(size) and not abs(planned - stock) <= FIRST_LOSS * size:
            return (
                f"the first loss is {planned:.6g}, {stock:.6g} in the untouched script, from the same parameters: "
                "more than precision explains"
            )
    return ""
