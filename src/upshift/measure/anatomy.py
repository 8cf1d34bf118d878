"""Fold step records into the anatomy of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from upshift.measure.stats import detect_warmup, mean_interval
from upshift.measure.steps import TIMED, StepRecord, evaluates_apart, training_seconds
from upshift.records import Anatomy, Phase, Quantity, unknown
from upshift.records.measurement import PHASES


def anatomy(
    records: Sequence[StepRecord],
    *,
    startup: float | None,
    batch_size: int | None = None,
    on_device: bool = False,
    left_out: frozenset[int] = frozenset(),
) -> Anatomy:
    """The anatomy of a global step.

    Args:
        records: consecutive steps from the first on.
        startup: seconds from process start to the first training work.
        batch_size: samples a batch of the training loader holds, where there is one.
        on_device: whether the script trains on an accelerator (host-to-device and syncs apply).
        left_out: indices of steps measured with instruments on, which tell nothing about time.
    """
    apart = evaluates_apart(records)
    times = [training_seconds(item, apart) for item in records]
    warm = detect_warmup(times) if len(times) >= 4 else min(1, len(times) - 1 if len(times) > 1 else 0)
    steady = [(r, t) for r, t in zip(records[warm:], times[warm:], strict=True) if r.number not in left_out]
    step = mean_interval([t for _, t in steady])
    total = math.fsum(t for _, t in steady)
    seen_data = any(item.batches for item in records)
    seen_forward = any(item.calls for item in records)
    phases = []
    accounted = [0.0] * len(steady)
    for name in PHASES:
        if name == "other":
            continue
        # A teacher's forward inside every step is part of the step.
        values = [
            getattr(r, name) + (r.nograd if name == "forward" and not apart else 0.0) if name in TIMED else 0.0
            for r, _ in steady
        ]
        accounted = [a + v for a, v in zip(accounted, values, strict=True)]
        note = ""
        if name in ("h2d", "sync") and not on_device:
            note = "not applicable on CPU"
            seconds, share = unknown("s"), unknown("fraction")
        elif (name == "data" and not seen_data) or (name in ("forward", "loss") and not seen_forward):
            note = (
                "no DataLoader seen; time spent making batches is in other host time"
                if name == "data"
                else "no module call seen"
            )
            seconds, share = unknown("s"), unknown("fraction")
        else:
            seconds, share = mean_interval(values), _share(values, total)
        phases.append(Phase(name=name, seconds=seconds, share=share, note=note))
    rest = [max(t - a, 0.0) for (_, t), a in zip(steady, accounted, strict=True)]
    phases.append(Phase(name="other", seconds=mean_interval(rest), share=_share(rest, total)))
    micro = mean_interval([float(max(len(r.losses), 1)) for r, _ in steady], unit="batches")
    samples = unknown("samples")
    if batch_size and seen_data:
        samples = mean_interval([float(r.batches * batch_size) for r, _ in steady], unit="samples")
    return Anatomy(
        step=step,
        phases=tuple(phases),
        steps_seen=len(records),
        warmup_steps=warm,
        warmup=Quantity(value=math.fsum(times[:warm]), unit="s", n=warm),
        startup=Quantity(value=startup, unit="s", n=1) if startup is not None else unknown("s"),
        evaluation=_total([r.nograd for r in records]) if apart else unknown("s"),
        checkpointing=_total([r.checkpoint for r in records]),
        micro_batches=micro,
        samples=samples,
    )


def _share(values: Sequence[float], total: float) -> Quantity:
    if not values or total <= 0:
        return unknown("fraction")
    return Quantity(value=math.fsum(values) / total, unit="fraction", n=len(values))


def _total(values: Sequence[float]) -> Quantity:
    """A sum over the steps watched; not seen at all is unknown, since it may still come."""
    seen = [value for value in values if value > 0]
    return Quantity(value=math.fsum(seen), unit="s", n=len(seen)) if seen else unknown("s")
