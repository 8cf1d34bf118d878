"""How long a step would take with other samples, in another precision, or on another device.

From one measured step: data and host time stay (data grows with the samples), each operation's own time is scaled by
the ratio of the two rooflines (Williams, Waterman and Patterson 2009),

    t' = calls * overhead + (t - calls * overhead) * R'(work') / R(work),    R = max(FLOPs / peak, bytes / bandwidth)

so what it achieves of its roofline here is taken to be what it achieves there. Only products (matrix products,
convolutions, attention) are held against a peak; everything else moves bytes. What grows with the samples is known per
operation, so reading the weights and stepping the optimizer are not scaled.

The interval. On another device an operation scales by the peaks or by the bandwidths, whichever its limit there is: the
slower and the faster of the two bound it. Each operation's efficiency may change by as much as efficiencies differ
between operations here; independent changes add as squares. That was seen not to be enough (kernels spread over
threads as their sizes allow, not as the peaks do), so the answer for any other device is an order of magnitude. Between
kinds of devices (a CPU to a GPU) neither overhead nor efficiency carries over: the interval is a factor of `MAGNITUDE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from upshift.advise.memory import AS_IS, LOWER
from upshift.records.estimate import DeviceFigures
from upshift.records.measurement import Measurement
from upshift.records.quantity import Quantity, estimated, unknown
from upshift.records.stepwork import OpWork, StepWork

#: Half of an order of magnitude: what an answer across kinds of devices may be off, either way.
MAGNITUDE = math.sqrt(10.0)

#: Share of a stated peak that is reached, against one measured by large products: value and range. Assumed.
STATED = (0.6, 0.35, 0.9)

#: Relative width of the interval: always; per doubling of the samples; for another precision; for another device.
ALWAYS, DOUBLING, PRECISION, DEVICE = 0.10, 0.08, 0.25, 0.15

#: Share of a phase's time that must be in operations a dry run makes, too, for them to be compared one by one.
ALIKE = 0.8

#: Seconds between two kernels, and of the host for one operation, on an accelerator. Assumed: some microseconds.
KERNEL, LAUNCH = 3e-6, 8e-6

#: No call of an operation costs more than this on the host before it does any work.
MOST_OVERHEAD = 2e-5

_GROUPS = {"backward": ("backward",), "optimizer": ("optimizer",), "forward": ("forward", "loss", "h2d")}
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "tf32": "tf32"}


@dataclass(frozen=True)
class StepPrediction:
    """Seconds of a step. `parts` (data, host, products, other operations) sum to it on a CPU; on an accelerator host
    and device work side by side. `how`: the method in a sentence; `why`: why nothing is known, where that is so."""

    step: Quantity
    parts: dict[str, float]
    order_of_magnitude: bool = False
    how: str = ""
    why: str = ""


@dataclass(frozen=True)
class _Part:
    """Operations with what they took here: `work` seconds that scale with the roofline, `overhead` that do not."""

    row: OpWork
    work: float
    overhead: float


class _Unknown(Exception):
    """A figure is missing; the text says which."""


def scale(
    seen: Measurement,
    source: DeviceFigures,
    target: DeviceFigures,
    *,
    batch: int | None = None,
    precision: str = AS_IS,
) -> StepPrediction:
    """Predict a step.

    Args:
        seen: what `diagnose` saw on `source`.
        source, target: devices; equal ones ask for other samples or another precision on the same.
        batch: samples of a pass; None: as seen.
        precision: one of `advise.memory.PRECISIONS`.

    Returns:
        Unknown, with the reason, where a figure is missing: nothing is guessed in its place.
    """
    step = seen.anatomy.step
    if not step.value:
        return _nothing("no step was timed")
    if precision in ("fp32", "tf32") and seen.facts.autocast:
        return _nothing(f"the step was timed under autocast, so {precision} is not known")
    work = seen.work
    ratio = 1.0
    if batch is not None:
        of = work.batch if work is not None and work.batch else None
        if of is None:
            return _nothing("the number of samples of the step seen is not known")
        ratio = batch / of
    if source == target and ratio == 1.0 and precision == AS_IS:
        return _as_measured(seen)
    try:
        rows = work.ops if work is not None and work.ops else _rows_of_floor(seen)
        return _predict(seen, _calibrated(seen, rows, source), source, target, ratio, precision)
    except _Unknown as missing:
        return _nothing(str(missing))


def _as_measured(seen: Measurement) -> StepPrediction:
    data, host = _phase(seen, "data"), _phase(seen, "other", "sync")
    step = seen.anatomy.step
    return StepPrediction(step, {"data": data, "host": host, "operations": max(step.or_else(0.0) - data - host, 0.0)},
                          how="measured here")  # fmt: skip


def of_other(seen: Measurement, other: StepWork, device: DeviceFigures) -> StepPrediction:
    """Predict a step of another model, from its operations (a dry run), with what operations like it achieve here."""
    if not seen.anatomy.step.value or seen.work is None or not seen.work.ops:
        return _nothing("no step was timed operation by operation")
    try:
        parts = _calibrated(seen, seen.work.ops, device)
        products = others = overhead = 0.0
        calls = max(sum(part.row.calls for part in parts), 1)
        each = math.fsum(part.overhead for part in parts) / calls
        unlike = _unlike(parts, other.ops)
        for phase, factor in unlike.items():
            products += factor * math.fsum(part.work + part.overhead for part in parts if part.row.phase == phase)
        for row in other.ops:
            if row.phase in unlike:
                continue
            seconds = roofline(row, device) / _efficiency(row, parts, device)
            products, others = (products + seconds, others) if row.product else (products, others + seconds)
            overhead += row.calls * each
    except _Unknown as missing:
        return _nothing(str(missing))
    ratio = 1.0 if unlike else sum(row.calls for row in other.ops) / calls
    host = (_phase(seen, "other") + _host(seen, parts)) * ratio + overhead
    data = _phase(seen, "data")
    value = data + host + products + others
    width = ALWAYS + (4 if unlike else 2) * DOUBLING
    found = estimated(value, "s", value / (1 + width), value * (1 + width))
    return StepPrediction(found, {"data": data, "host": host, "products": products, "other operations": others},
                          how="operations of a dry run, at what such operations achieve here")  # fmt: skip


def _unlike(parts: Sequence[_Part], other: Sequence[OpWork]) -> dict[str, float]:
    """Phases in which a dry run makes other operations than were seen (recurrent layers fall apart into products):
    phase -> FLOPs of its products against those seen, by which the phase is scaled as a whole.

    Raises:
        _Unknown: such a phase has no products to compare.
    """
    found = {}
    for phase in _GROUPS:
        mine = [part for part in parts if part.row.phase == phase]
        names = {row.name for row in other if row.phase == phase}
        whole = math.fsum(part.work for part in mine)
        if math.fsum(part.work for part in mine if part.row.name in names) >= ALIKE * whole:
            continue
        before = _flops([part.row for part in mine])
        after = _flops([row for row in other if row.phase == phase])
        if not before or not after:
            raise _Unknown("the dry run makes other operations than were seen")
        found[phase] = after / before
    return found


def _flops(rows: Iterable[OpWork]) -> float:
    return math.fsum(row.scaled_flops + row.fixed_flops for row in rows if row.product)


def roofline(row: OpWork, device: DeviceFigures, ratio: float = 1.0, precision: str = AS_IS) -> float:
    """Least seconds of these operations on a device, with `ratio` times the samples.

    Raises:
        _Unknown: the device's bandwidth, or its peak in that dtype, is not known.
    """
    return max(_by_peak(row, device, ratio, precision), _by_bandwidth(row, device, ratio, precision))


def _by_peak(row: OpWork, device: DeviceFigures, ratio: float, precision: str) -> float:
    flops = row.scaled_flops * ratio + row.fixed_flops
    if not row.product or not flops:
        return 0.0
    dtype = row.dtype
    if dtype == "float32":
        dtype = _PRECISIONS.get(precision, dtype)
    peak = device.flops.get(dtype)
    if not peak:
        raise _Unknown(f"the peak of {device.name} in {dtype} is not known")
    return flops / peak


def _by_bandwidth(row: OpWork, device: DeviceFigures, ratio: float, precision: str) -> float:
    if not device.bandwidth:
        raise _Unknown(f"the memory bandwidth of {device.name} is not known")
    less = 1.0 - row.low / 2 if precision in LOWER else 1.0
    return (row.scaled_bytes * ratio + row.fixed_bytes) * less / device.bandwidth


def _phase(seen: Measurement, *names: str) -> float:
    return math.fsum(phase.seconds.or_else(0.0) for phase in seen.anatomy.phases if phase.name in names)


def _calibrated(seen: Measurement, rows: Sequence[OpWork], source: DeviceFigures) -> list[_Part]:
    """What each operation took in a steady step: its time in the step looked at, fitted to the phases."""
    timed = [row.seconds / row.calls for row in rows if row.seconds and row.calls]
    overhead = min([*timed, MOST_OVERHEAD]) if timed else 0.0
    parts = []
    for group, phases in _GROUPS.items():
        chosen = [row for row in rows if row.phase == group]
        whole = _phase(seen, *phases)
        if seen.device_phases:
            whole = math.fsum(seen.device_phases[name].or_else(0.0) for name in phases if name in seen.device_phases)
        if all(row.seconds is not None for row in chosen):
            spent = math.fsum(row.seconds or 0.0 for row in chosen)
            # Being looked at slows every call a little, so that the sum may exceed the phase.
            fit = min(whole / spent, 1.0) if spent > 0 else 0.0
            for row in chosen:
                mine = fit * (row.seconds or 0.0)
                floor = min(fit * row.calls * overhead, mine)
                parts.append(_Part(row, mine - floor, floor))
        else:
            ideal = [roofline(row, source) for row in chosen]
            fit = whole / math.fsum(ideal) if math.fsum(ideal) > 0 else 0.0
            parts += [_Part(row, fit * least, 0.0) for row, least in zip(chosen, ideal, strict=True)]
    return parts


def _host(seen: Measurement, parts: Iterable[_Part]) -> float:
    """Host time of forward, backward and optimizer beyond their operations."""
    whole = _phase(seen, *(name for names in _GROUPS.values() for name in names))
    return max(whole - math.fsum(part.work + part.overhead for part in parts), 0.0)


def _efficiency(row: OpWork, parts: Sequence[_Part], device: DeviceFigures) -> float:
    """What such an operation achieves of its roofline here: of the same name and nearest size, else of its class."""

    def size(item: OpWork) -> float:
        return math.log(1.0 + item.scaled_flops + item.fixed_flops + item.scaled_bytes + item.fixed_bytes) - math.log(
            max(item.calls, 1)
        )

    known = [(part, roofline(part.row, device)) for part in parts if part.work > 0]
    known = [(part, least) for part, least in known if least > 0]
    same = [item for item in known if item[0].row.phase == row.phase and item[0].row.name == row.name]
    if same:
        part, least = min(same, key=lambda item: abs(size(item[0].row) - size(row)))
        return least / part.work
    alike = [item for item in known if item[0].row.product == row.product] or known
    if not alike:
        raise _Unknown("no operation was timed")
    return math.fsum(least for _, least in alike) / math.fsum(part.work for part, _ in alike)


def _predict(seen: Measurement, parts: Sequence[_Part], source: DeviceFigures, target: DeviceFigures, ratio: float,
             precision: str) -> StepPrediction:  # fmt: skip
    data = _phase(seen, "data") * ratio
    rest = _phase(seen, "other", "sync")
    if source.kind != target.kind:
        return _other_kind(seen, parts, target, ratio, precision, data, rest)
    value = low = high = products = 0.0
    moved, squares, spread = source != target, 0.0, _spread(parts, source)
    share = STATED if source.measured and not target.measured and moved else (1.0, 1.0, 1.0)
    for part in parts:
        row = part.row
        before = roofline(row, source)
        if not part.work or not before:
            value, low, high = value + part.work, low + part.work, high + part.work
            continue
        factor = roofline(row, target, ratio, precision) / before
        bounds = [factor]
        if moved or precision != AS_IS:
            bounds += _factors(row, source, target, ratio, precision)
        mine = part.work * factor / share[0]
        value += mine
        products += mine if row.product else 0.0
        squares += (spread * mine) ** 2 if moved else 0.0
        low += part.work * min(bounds) / share[2]
        high += part.work * max(bounds) / share[1]
    overhead = math.fsum(part.overhead for part in parts) + _host(seen, parts)
    if seen.device_phases:
        # Host and device work side by side: the step is as long as the longer of the two.
        host = max(seen.anatomy.step.or_else(0.0) - _phase(seen, "data", "sync"), 0.0)
        value, low, high = (max(item, host) for item in (value, low, high))
        total, host = data + value, host
        ends = data + low, data + high
    else:
        host = overhead + rest
        total, ends = data + host + value, (data + host + low, data + host + high)
    width = ALWAYS + DOUBLING * abs(math.log2(ratio)) + _noise(seen.anatomy.step)
    if precision != AS_IS:
        width = math.hypot(width, PRECISION)
    if moved:
        width = math.hypot(width, DEVICE, math.sqrt(squares) / total)
    how = "scaled from the step measured, operation by operation, by the rooflines"
    how += " of both devices" if moved else " of this machine"
    found = estimated(total, "s", ends[0] / (1 + width), ends[1] * (1 + width))
    # Where arithmetic and memory answer so differently (a precision the device only emulates), no point is worth much.
    # On another device the interval was seen to hold too seldom: between one and two threads 3 times in 18.
    rough = moved or ends[1] * (1 + width) ** 2 > MAGNITUDE**2 * ends[0]
    shown = {"data": data, "host": host, "products": products, "other operations": value - products}
    return StepPrediction(found, shown, order_of_magnitude=rough, how=how)


def _factors(row: OpWork, source: DeviceFigures, target: DeviceFigures, ratio: float, precision: str) -> list[float]:
    """By how much the time changes if arithmetic is the limit on both devices, and if memory is."""
    found = []
    peak, bandwidth = _by_peak(row, source, 1.0, AS_IS), _by_bandwidth(row, source, 1.0, AS_IS)
    if peak:
        found.append(_by_peak(row, target, ratio, precision) / peak)
    if bandwidth:
        moved = _by_bandwidth(row, target, ratio, precision) / bandwidth
        found.append(moved)
        ours, theirs = source.flops.get("float32"), target.flops.get("float32")
        if not row.product and ours and theirs:
            # Elementwise work that stays in the caches, or is more than one operation per element, follows the cores.
            found.append(moved * (target.bandwidth or 1.0) / (source.bandwidth or 1.0) * ours / theirs)
    return found


def _spread(parts: Sequence[_Part], source: DeviceFigures) -> float:
    """Weighted standard deviation of the logarithm of what operations achieve of their roofline (at most 1)."""
    found = [(part.work, math.log(least / part.work)) for part in parts
             if part.work > 0 and (least := roofline(part.row, source)) > 0]  # fmt: skip
    weight = math.fsum(item for item, _ in found)
    if len(found) < 2 or weight <= 0:
        return 0.0
    middle = math.fsum(item * value for item, value in found) / weight
    return min(math.sqrt(math.fsum(item * (value - middle) ** 2 for item, value in found) / weight), 1.0)


def _noise(step: Quantity) -> float:
    if not step.value or step.low is None or step.high is None:
        return 0.0
    return min(max((step.high - step.low) / 2 / step.value, 0.0), 1.0)


def _other_kind(seen: Measurement, parts: Sequence[_Part], target: DeviceFigures, ratio: float, precision: str,
                data: float, rest: float) -> StepPrediction:  # fmt: skip
    device = products = 0.0
    calls = 0
    for part in parts:
        row = part.row
        mine = roofline(row, target, ratio, precision) / STATED[0] + row.calls * KERNEL
        device += mine
        products += mine if row.product else 0.0
        calls += row.calls
    host = calls * LAUNCH + min(_host(seen, parts), rest + calls * LAUNCH) + rest if target.kind != "cpu" else rest
    value = data + (max(host, device) if target.kind != "cpu" else host + device)
    if not value > 0:
        return _nothing("nothing was seen that could be scaled")
    found = estimated(value, "s", value / MAGNITUDE, value * MAGNITUDE)
    shown = {"data": data, "host": host, "products": products, "other operations": device - products}
    how = "order of magnitude: the operations seen, at a usual share of the other kind's peaks"
    return StepPrediction(found, shown, order_of_magnitude=True, how=how)


def _rows_of_floor(seen: Measurement) -> tuple[OpWork, ...]:
    """Where no operation was seen one by one: each phase as one operation, from its count of FLOPs and bytes.

    Raises:
        _Unknown: they were not counted either.
    """
    floor = seen.floor
    if floor is None or floor.flops.value is None or floor.bytes_moved.value is None or not floor.by_phase:
        raise _Unknown("the work of a step was not counted")
    moved = floor.bytes_moved.high or floor.bytes_moved.value
    whole = max(_phase(seen, "forward", "loss", "backward", "optimizer"), 1e-12)
    rows = []
    for phase, flops in floor.by_phase.items():
        share = _phase(seen, *_GROUPS.get(phase, ())) / whole
        fixed = phase == "optimizer"
        rows.append(OpWork(
            phase=phase, name="all", dtype=floor.dtype, calls=0, product=not fixed,
            scaled_flops=0.0 if fixed else flops, fixed_flops=flops if fixed else 0.0,
            scaled_bytes=0.0 if fixed else moved * share, fixed_bytes=moved * share if fixed else 0.0,
        ))  # fmt: skip
    return tuple(rows)


def _nothing(why: str) -> StepPrediction:
    return StepPrediction(unknown("s"), {}, why=why)
