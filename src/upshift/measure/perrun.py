"""The figures of one run, as they are compared with those of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from upshift.measure import series
from upshift.records.comparison import Mode, Point
from upshift.records.ledger import Entry, Ledger
from upshift.records.quantity import Quantity
from upshift.records.run import Run

#: Kind of the event, if any, whose values hold what a run's model is: `parameters`, `inference_seconds`.
MODEL = "model"

#: Figures that the books of a run hold.
BOOKS = {
    "time": "seconds", "hours": "device_hours", "cost": "cost", "energy": "energy", "carbon": "carbon",
    "cost_per_epoch": "cost_per_epoch", "memory": "memory", "gpu_memory": "gpu_memory",
}  # fmt: skip


class Seen(NamedTuple):
    """A run, its books, and where it lies. `metrics`: name -> values, of the log and of what was logged beside it."""

    run: Run
    ledger: Ledger | None = None
    metrics: Mapping[str, Sequence[Point]] = {}
    place: str = ""


class Value(NamedTuple):
    """A figure of one run; `math.inf` is worse than any, as it was never reached or is not finite."""

    value: float
    entry: Entry


class Figures(NamedTuple):
    """What is known of one run, by figure; what is not known is left out."""

    values: dict[str, Value]
    points: tuple[Point, ...]
    notes: tuple[str, ...]


class Common(NamedTuple):
    """Up to where all runs can be compared; None where they are of one length."""

    step: float | None = None
    time: float | None = None


def last_step(seen: Seen) -> float | None:
    """The updates a run made, as far as its record goes."""
    steps = [float(seen.run.steps)] if seen.run.steps else []
    steps += [p.step for points in seen.metrics.values() for p in points if p.step is not None]
    return max(steps, default=None)


def common(runs: Sequence[Seen]) -> Common:
    """The last step and the last second that every run has."""
    steps, times = [last_step(item) for item in runs], [duration(item) for item in runs]
    return Common(_least(steps), _least(times, 0.02))


def _least(values: Sequence[float | None], tolerance: float = 0.0) -> float | None:
    known = [value for value in values if value is not None and value > 0]
    if len(known) < len(values) or not known or max(known) - min(known) <= tolerance * max(known):
        return None
    return min(known)


def duration(seen: Seen) -> float | None:
    """Seconds of the whole run, all its starts."""
    found = seen.ledger.seconds.value.value if seen.ledger is not None else None
    if found is None and seen.run.seconds is not None:
        found = math.fsum((*seen.run.earlier, seen.run.seconds))
    return found if found is not None and math.isfinite(found) and found >= 0 else None


def figures(seen: Seen, name: str, mode: Mode, target: float | None, until: Common) -> Figures:
    """The figures of a run.

    Args:
        name: of the metric in this run; empty where the training loss is compared, or nothing.
        mode: which way it is better.
        target: value whose first time counts.
        until: where all runs are compared.
    """
    values = _books(seen)
    notes: list[str] = []
    lossy = not name
    points = tuple(series.losses(seen.run)) if lossy else tuple(seen.metrics.get(name, ()))
    loss = series.final_loss(seen.run)
    if loss is not None:
        values["loss"] = _told(loss, "", "mean over the last tenth of the steps")
    if points:
        final = loss if lossy and points[-1].value is not None else points[-1].value
        if final is None:
            notes.append("its last value is not finite, which counts as worse than any")
        how = "mean over the last tenth of the steps" if lossy else "last value of the run"
        values["metric"] = _told(_worst(mode) if final is None else final, "", how)
        known = [p.value for p in points if p.value is not None]
        if known:
            values["best"] = _told(max(known) if mode == "max" else min(known), "", "best value of the run")
        _at_common(values, points, until)
        if target is not None:
            notes += _to_target(values, seen, points, mode, target)
    _model(values, seen.run)
    return Figures({name: value for name, value in values.items() if _sound(value.value)}, points, tuple(notes))


def _sound(value: float) -> bool:
    """Whether a value may be computed with: infinite, or of a size that any unit has."""
    return not math.isnan(value) and (math.isinf(value) or abs(value) < series.LIMIT)


def _worst(mode: Mode) -> float:
    return -math.inf if mode == "max" else math.inf


def _told(value: float, unit: str, how: str) -> Value:
    return Value(value, Entry(Quantity(value if math.isfinite(value) else None, unit, n=1), how))


def _books(seen: Seen) -> dict[str, Value]:
    """What the books hold, and the time of a step."""
    found: dict[str, Value] = {}
    for figure, field in BOOKS.items():
        entry: Entry | None = getattr(seen.ledger, field) if seen.ledger is not None else None
        value = entry.value.value if entry is not None else None
        if entry is not None and value is not None and math.isfinite(value) and entry.value.basis != "unknown":
            found[figure] = Value(value, entry)
    seconds = duration(seen)
    if "time" not in found and seconds is not None:
        found["time"] = _told(seconds, "s", "from the log of the run")
    step = series.step_seconds(seen.run)
    if step is not None:
        found["step"] = _told(step, "s", "mean of a training step, warm-up, evaluation and checkpoints apart")
    return found


def _at_common(values: dict[str, Value], points: Sequence[Point], until: Common) -> None:
    """The last value at or before the step, and the second, that all runs have."""
    if until.step is not None:
        reached = [p for p in points if p.step is not None and p.step <= until.step and p.value is not None]
        if reached and reached[-1].value is not None:
            how = f"value at step {reached[-1].step:,.0f}, the last one up to step {until.step:,.0f}"
            values["at_step"] = _told(reached[-1].value, "", how)
    if until.time is not None:
        reached = [p for p in points if p.at is not None and p.at <= until.time and p.value is not None]
        if reached and reached[-1].value is not None:
            how = f"value after {reached[-1].at:,.0f} s, the last one up to {until.time:,.0f} s"
            values["at_time"] = _told(reached[-1].value, "", how)


def _to_target(
    values: dict[str, Value], seen: Seen, points: Sequence[Point], mode: Mode, target: float
) -> list[str]:  # fmt: skip
    first = next((p for p in points if p.value is not None
                  and (p.value >= target if mode == "max" else p.value <= target)), None)  # fmt: skip
    if first is None:
        values["to_target"] = _told(math.inf, "s", "not reached")
        values["steps_to_target"] = _told(math.inf, "steps", "not reached")
        early = f", and it is {seen.run.status}" if seen.run.status != "finished" else ""
        return [f"the target was not reached{early}"]
    if first.at is not None:
        values["to_target"] = _told(first.at, "s", "first value that reached it, evaluations in between not seen")
    if first.step is not None:
        values["steps_to_target"] = _told(first.step, "steps", "first value that reached it")
    return [] if first.at is not None else ["when the target was reached is not in its record"]


def _model(values: dict[str, Value], run: Run) -> None:
    """What the record says of the model itself."""
    for event in run.events:
        for figure, field, unit in (("parameters",) * 3, ("inference", "inference_seconds", "s")):
            value = event.values.get(field) if event.kind == MODEL else None
            if value is not None and math.isfinite(value):
                values[figure] = _told(value, unit, event.text or "from the run's record")
