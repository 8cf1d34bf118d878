"""Shared by the rules: reading a measurement without taking unknown for zero, and predicting gains.

Gains follow Amdahl 1967: a part with share s of the step, made f times faster, leaves 1 - s + s / f of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from upshift import units
from upshift.records import Finding, Floor, LineCost, Measurement, Quantity, unknown
from upshift.records.quantity import estimated


def share_of(m: Measurement, *phases: str) -> Quantity:
    """Share of the step (fraction) the named phases take together; unknown if any of them is."""
    found = {item.name: item.share for item in m.anatomy.phases}
    parts = [found.get(name) for name in phases]
    values = [part.value for part in parts if part is not None and part.value is not None]
    if not parts or len(values) != len(parts) or not all(math.isfinite(value) for value in values):
        return unknown("fraction")
    known = [part for part in parts if part is not None]
    lows = [part.low for part in known if part.low is not None]
    highs = [part.high for part in known if part.high is not None]
    return Quantity(
        value=min(1.0, max(0.0, math.fsum(values))),
        unit="fraction",
        low=max(0.0, math.fsum(lows)) if len(lows) == len(known) else None,
        high=min(1.0, math.fsum(highs)) if len(highs) == len(known) else None,
        n=min(part.n for part in known),
        basis="measured" if all(part.basis == "measured" for part in known) else "estimated",
    )


def known(quantity: Quantity | None) -> float | None:
    """The value where it is a finite number of zero or more; otherwise None."""
    if quantity is None or quantity.value is None or not math.isfinite(quantity.value) or quantity.value < 0:
        return None
    return quantity.value


def amdahl(share: float, factor: float) -> float:
    """Speed-up of the whole when a part of `share` (0..1) becomes `factor` times faster (infinite: it vanishes)."""
    share = min(max(share, 0.0), 1.0)
    rest = 1.0 - share + (share / factor if math.isfinite(factor) else 0.0)
    return 1.0 / max(rest, 0.01)


def gain(share: Quantity, likely: float, *, low: float = 1.0, high: float = math.inf) -> Quantity:
    """Predicted speed-up of the step when the part `share` becomes `likely` (between `low` and `high`) times faster."""
    if share.value is None:
        return unknown("ratio")
    least = share.value if share.low is None else share.low
    most = share.value if share.high is None else share.high
    return estimated(amdahl(share.value, likely), "ratio", amdahl(least, low), amdahl(most, high))


def least_seconds(floor: Floor | None) -> float | None:
    """What the arithmetic (in the dtype in use) and the memory traffic of a step need; None where it is not known."""
    if floor is None:
        return None
    flops, peak, memory = known(floor.flops), known(floor.peak_flops), known(floor.bandwidth_floor)
    return None if flops is None or not peak or memory is None else max(flops / peak, memory)


def percent(quantity: Quantity) -> str:
    """A share for people, with its interval where there is one."""
    if quantity.value is None:
        return "an unknown share"
    text = units.percent(quantity.value)
    if quantity.low is not None and quantity.high is not None and quantity.high > quantity.low:
        text += f" ({units.percent(quantity.low)} to {units.percent(quantity.high)})"
    return text


def duration(quantity: Quantity) -> str:
    """Seconds for people."""
    return "an unknown time" if quantity.value is None else units.seconds(quantity.value)


def place(line: LineCost) -> str:
    """`train.py:88`: file name and line."""
    return f"{line.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line.line}"


def quote(line: LineCost) -> str:
    """Place and text of a line."""
    return f"{place(line)} `{line.text[:80]}`" if line.text else place(line)


def lines_of(m: Measurement, kind: str) -> list[LineCost]:
    """Lines of a kind with a known share, most first."""
    found = [item for item in m.lines if item.kind == kind and known(item.share) is not None]
    return sorted(found, key=lambda item: -item.share.or_else(0.0))


def total_share(lines: Sequence[LineCost]) -> Quantity:
    """Shares of lines added up, interval ends too (wider than need be); unknown without lines."""
    if not lines:
        return unknown("fraction")
    lows = [item.share.low if item.share.low is not None else item.share.or_else(0.0) for item in lines]
    highs = [item.share.high if item.share.high is not None else item.share.or_else(0.0) for item in lines]
    return Quantity(
        value=min(1.0, math.fsum(item.share.or_else(0.0) for item in lines)),
        unit="fraction",
        low=min(1.0, math.fsum(lows)),
        high=min(1.0, math.fsum(highs)),
        n=min(item.share.n for item in lines),
    )


#: Lines are not scaled up beyond this: too few of them were seen to stand for the rest.
MOST_SCALE = 4.0


def fitted(lines: Sequence[LineCost], least: Quantity, most: Quantity) -> list[LineCost]:
    """The lines of some phases with shares that add up to at least `least` and at most `most`.

    Phases are timed exactly. The sampler sees short stretches that hold the interpreter lock too rarely, and charges
    them to the line after, so it only tells how a phase divides among its lines.
    """
    seen = math.fsum(item.share.or_else(0.0) for item in lines)
    if seen <= 0:
        return list(lines)
    factor = 1.0
    if least.value is not None and seen < least.value:
        factor = min(least.value / seen, MOST_SCALE)
    elif most.value is not None and seen > most.value:
        factor = most.value / seen
    return [msgspec.structs.replace(item, share=_scaled(item.share, factor)) for item in lines]


def _scaled(share: Quantity, factor: float) -> Quantity:
    low, high = ((None if end is None else min(1.0, end * factor)) for end in (share.low, share.high))
    return msgspec.structs.replace(share, value=min(1.0, share.or_else(0.0) * factor), low=low, high=high)


def on_cpu(m: Measurement) -> bool:
    """Whether the training runs on the CPU."""
    return m.facts.device.startswith("cpu")


def layer_count(m: Measurement, names: Iterable[str]) -> int:
    """How many layers of the trained models have one of these class names."""
    wanted = set(names)
    return sum(
        count for model in m.facts.models if model.trained for name, count in model.layers.items() if name in wanted
    )


#: Samples up to which a batch is tiny: above, it is not the batch that is small.
TINY = 16
#: Small kernels reach about a fifth of the peaks that floors are made of.
SMALL_KERNELS = 5.0


def samples_fed(m: Measurement) -> int | None:
    """Samples the trained models are fed at a time: the first size of the first tensor; None where none was seen."""
    shapes = [item.input_shapes[0] for item in m.facts.models if item.trained and item.input_shapes]
    return max((shape[0] for shape in shapes if shape), default=None)


def severity(share: Quantity, predicted: Quantity) -> Literal["major", "minor"]:
    """`major` where a tenth of the step or more may be gained, else `minor`."""
    return "major" if predicted.or_else(1.0) >= 1.10 and share.or_else(0.0) >= 0.10 else "minor"


def rank(finding: Finding) -> float:
    """Predicted gain times confidence, for ordering; findings without a prediction come last but one, notes last.

    What makes the training useless (major, and no matter of speed) comes before everything.

    Confidence runs from one half (nothing may be gained) to one (even the low end is the predicted gain).
    """
    if finding.severity == "note":
        return -1.0
    value = finding.gain.value
    if value is None and finding.severity == "major":
        return math.inf
    if value is None or value <= 1:
        return 0.0
    low = finding.gain.low if finding.gain.low is not None else 1.0
    certainty = min(1.0, max(0.0, (low - 1.0) / (value - 1.0)))
    return (value - 1.0) * (0.5 + 0.5 * certainty)
