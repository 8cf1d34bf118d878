"""The late step of a confirmation: both arms from one state, at the end of the alternation; see `hook/latestep.py`.

Only for plans that round: identical bits need no such look, and another random stream draws other batches. One step
from the same state amplifies nothing, so gradients and updates are held to the limits of the second step; bfloat16,
whose error grows as gradients become small, is only tested for gross faults. The limits were not measured
at late steps: ten harmless plans on the scripts of `benchmarks/bench_proof.py` (bf16, compile, fused, foreach,
channels_last, denormals), one trial each, passed after 22 to 150 steps, two of them with identical losses.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from upshift.measure.updates import LIMITS, Limits, Precision, apart
from upshift.search.alike import FIRST_LOSS
from upshift.search.duel import Arm, Duel, Ended

#: What gradients and updates in bfloat16 may differ by: gross faults only.
GROSS = Limits(math.inf, 0.0, -0.9, 1.0)


class Late(NamedTuple):
    """`problem`: what is wrong with the step. `unseen`: why it was not made, which says nothing for or against."""

    problem: str = ""
    unseen: str = ""


def late_step(duel: Duel, a: Arm, b: Arm, precision: Precision) -> Late:
    """Let both arms make one step from the state of the reference.

    Raises:
        ArmFailed: an arm crashed or hung.
    """
    if a.steps != b.steps:
        return Late(unseen="the arms have not made the same steps")
    number = a.steps
    try:
        unseen = _hand_over(duel, a, b)
        if unseen:
            return Late(unseen=unseen)
        for arm in (a, b):
            duel.ask(arm, {"kind": "late", "path": str(arm.child.record / "late.npz")}, "done")
            duel.go(arm, 1)
    except Ended:
        return Late(unseen="the script ends before it")
    where = f"at step {number + 1}, from one and the same state,"
    return Late(_loss_apart(a, b, number, where) or _moves_apart(a, b, precision, where))


def _hand_over(duel: Duel, a: Arm, b: Arm) -> str:
    """Give the candidate the state of the reference; returns why that was not possible."""
    state = a.child.record / "late-state.pt"
    unseen = str(duel.ask(a, {"kind": "state", "save": str(state)}, "state")["problem"])
    if unseen:
        return unseen
    taken = b.child.record / state.name
    state.rename(taken)
    try:
        return str(duel.ask(b, {"kind": "state", "load": str(taken)}, "state")["problem"])
    finally:
        taken.unlink(missing_ok=True)


def _loss_apart(a: Arm, b: Arm, number: int, where: str) -> str:
    stock, planned = a.losses.get(number), b.losses.get(number)
    if not stock or not planned or len(stock) != len(planned):
        return ""
    size = max(abs(value) for step in range(min(12, number)) for value in a.losses.get(step, (0.0,)))
    if all(abs(x - y) <= FIRST_LOSS * max(size, abs(x)) for x, y in zip(stock, planned, strict=True)):
        return ""
    return f"{where} the loss is {planned[0]:.6g}, {stock[0]:.6g} in the untouched script"


def _moves_apart(a: Arm, b: Arm, precision: Precision, where: str) -> str:
    limits = GROSS if precision == "bfloat16" else LIMITS["float32"]["second"]
    first, second = (_kept(arm.child.record / "late.npz") for arm in (a, b))
    if "masks" in first and "masks" in second:
        drawn, planned = ([round(float(p), 6) for p in arm["masks"]] for arm in (first, second))
        if drawn != planned:
            return f"{where} dropout draws {_masks(planned)}, {_masks(drawn)} in the untouched script"
    for kind, word in (("grad:", "gradients"), ("update:", "updates")):
        r, c = ({k[len(kind) :]: v for k, v in arm.items() if k.startswith(kind)} for arm in (first, second))
        if not r or not c:
            continue
        problem = apart(r, c, limits)
        if problem:
            return f"{where} the {word} differ more than precision explains: {problem}"
    return ""


def _masks(drawn: list[float]) -> str:
    return f"{len(drawn)} masks (mean probability {sum(drawn) / len(drawn):.3g})" if drawn else "no mask"


def _kept(file: Path) -> dict[str, Any]:
    import numpy

    if not file.exists():
        return {}
    with numpy.load(file, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}
