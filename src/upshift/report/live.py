"""A run as it stands, on a terminal: what `watch` draws, and the same as plain text.

Everything adapts to the width it is given when it is drawn, so that a resized terminal needs no other code. Meaning
never rests on colour: bars have lengths, phases have their own fill and a legend, states are words.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from upshift import units
from upshift.records.ledger import Ledger
from upshift.records.quantity import Quantity
from upshift.records.resources import Resources, Sample
from upshift.records.run import Window
from upshift.report import current, ledger_words, words
from upshift.report.blocks import facts as _facts
from upshift.report.blocks import head as _head
from upshift.report.blocks import indent as _indent
from upshift.report.blocks import joined as _join
from upshift.report.blocks import line as _text
from upshift.report.blocks import title as _title
from upshift.report.current import GpuNow, Moment, Snapshot
from upshift.report.meters import Legend, Meter, Spark, Stack

#: Columns of a name.
NAMES = 9

#: Rows of alarms, events and accelerators on one screen.
MOST_ALARMS, MOST_EVENTS, MOST_GPUS, MOST_METRICS = 5, 5, 8, 6

#: A log that was silent for so many seconds, or so many of its usual windows, is worth a word.
SILENT_SECONDS, SILENT_WINDOWS = 30.0, 5.0

_STATES = {
    "running": ("running", "bold green"),
    "finished": ("finished", "bold green"),
    "failed": ("failed", "bold red"),
    "interrupted": ("interrupted", "bold yellow"),
    "unknown": ("not known to run: no such process on this machine, and the log has no end", "bold yellow"),
}


def render(moment: Moment) -> RenderableType:
    """One screen: state and time left, loss, phases, machine, energy and cost, alarms, events. The first matter most.

    Args:
        moment: what is known now.
    """
    seen = current.snapshot(moment)
    run = moment.run
    parts: list[RenderableType] = [_title("watch", run.script, run.arguments), _state(seen), _pace(seen)]
    if seen.share < 1:
        told = f"The log is being read, {words.percent(seen.share)} so far: sums over the whole run follow."
        parts.append(_text(told, "yellow"))
    parts += _warnings(seen, moment)
    rows: list[tuple[str, RenderableType]] = [("plan", _text(_plan(seen)))]
    if seen.steps_planned:
        done = seen.steps / seen.steps_planned
        rows.append(("progress", Meter(done, f"{words.percent(min(done, 1.0))} of {seen.steps_planned:,} steps")))
    rows += _loss(seen, run.windows)
    rows += _phases(seen)
    parts += [Text(), _rows(rows), Text(), _rows(_machine(seen, moment.resources)), Text(), _rows(_books(moment))]
    if len(seen.alarms) > 1:
        parts += [Text(), _head("Alarms before"), _indent(_told(
            [(item.at, item.name, item.text) for item in seen.alarms[-2::-1][:MOST_ALARMS]], "yellow"
        ))]  # fmt: skip
    if seen.events:
        parts += [Text(), _head("Events, the newest first"), _indent(_told(
            [(item.at, item.kind, item.text) for item in seen.events[::-1][:MOST_EVENTS]], "cyan"
        ))]  # fmt: skip
    parts += [Text(), *(_text(f"- {words.clean(note, 300)}", "dim") for note in seen.notes[:5])]
    parts.append(_text("What is not marked is measured, speed and machine over the last half minute.", "dim"))
    return Group(*parts)


def text(moment: Moment, width: int = 100) -> str:
    """The screen as plain text of so many columns, without colour or escape sequences."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False, color_system=None, highlight=False).print(render(moment))
    return file.getvalue()


def render_books(ledger: Ledger) -> RenderableType:
    """All books of a run, with how each figure is known."""
    return Group(Text(), _head("What it used and cost"), _indent(_facts(ledger_words.rows(ledger))))


def _rows(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim", width=NAMES, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for name, value in rows:
        table.add_row(_text(name), value)
    return table


def _told(rows: Sequence[tuple[float, str, str]], style: str) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim", overflow="fold", max_width=12)
    table.add_column(overflow="fold")
    for at, name, told in rows:
        line = _text(words.clean(name, 60), style)
        line.append(f"  {words.clean(told, 300)}", style="")
        table.add_row(_text(words.duration(at)), line)
    return table


def _state(seen: Snapshot) -> Text:
    told, style = _STATES[seen.status]
    if seen.exit_code is not None:
        told += f" with exit code {seen.exit_code}"
    line = _text(told, style)
    if words.known(seen.elapsed):
        how_long = "for" if seen.status == "running" else "after"
        line.append(f" {how_long} {words.duration(seen.elapsed.value)}", style="")
    total = f" of {seen.steps_planned:,}" if seen.steps_planned else ""
    line.append(f" · step {seen.steps:,}{total}", style="")
    return line


def _pace(seen: Snapshot) -> Text:
    speed = f"{words.number(words.three(seen.speed.or_else(0.0)))} steps/s ({words.duration(seen.step.value)} a step)"
    parts = [speed if words.known(seen.speed) else "speed unknown: no timed steps yet"]
    if seen.status in ("running", "unknown"):
        parts.append(left_text(seen))
    return _join(parts)


def left_text(seen: Snapshot) -> str:
    """`about 12 min left (9 min to 15 min, estimated from ...)`, or why that is unknown."""
    left = seen.left
    if not words.known(left):
        return f"time left unknown: {seen.left_how}"
    bounds = f"{words.duration(left.low)} to {words.duration(left.high)}, " if left.low != left.high else ""
    return f"about {words.duration(left.value)} left ({bounds}{left.basis} {seen.left_how})"


def _plan(seen: Snapshot) -> str:
    if not seen.techniques:
        return "none: the untouched training"
    return words.arm_text(seen.techniques) + (f" (from {words.clean(seen.plan, 200)})" if seen.plan else "")


def _warnings(seen: Snapshot, moment: Moment) -> list[RenderableType]:
    """What a person should see before any figure."""
    found: list[RenderableType] = []
    gaps = [b.at - a.at for a, b in pairwise(moment.recent[-20:]) if b.at > a.at]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    if (
        seen.status == "running"
        and words.finite(seen.silent)
        and seen.silent > max(SILENT_SECONDS, SILENT_WINDOWS * usual)
    ):
        told = f"No step for {words.duration(seen.silent)}: it waits, evaluates, saves, or hangs."
        found.append(_text(told, "bold yellow"))
    if moment.run.guard_fired:
        found.append(_text("The guard took techniques off: see the events.", "bold yellow"))
    if seen.alarms:
        # A small terminal may not reach down to the others.
        last = seen.alarms[-1]
        told = f"Alarm {words.clean(last.name, 60)}, after {words.duration(last.at)}: {words.clean(last.text, 200)}"
        found.append(_text(told, "bold yellow"))
    return found


def _loss(seen: Snapshot, windows: Sequence[Window]) -> list[tuple[str, RenderableType]]:
    if not words.known(seen.loss):
        rows: list[tuple[str, RenderableType]] = [("loss", _text("unknown: none was read so far"))]
    else:
        rows = [("loss", _text(f"{seen.loss.value:.4g} at step {seen.loss_step or 0:,}"))]
        curve = [item.loss for item in windows]
        if sum(value is not None for value in curve) > 1:
            rows.append(("", Spark(curve)))
    if seen.metrics:
        told = [f"{words.clean(name, 60)} {words.UNKNOWN if value is None else f'{value:.4g}'}"
                for name, value in list(seen.metrics.items())[:MOST_METRICS]]  # fmt: skip
        more = len(seen.metrics) - MOST_METRICS
        at = f" (step {seen.metrics_step:,})" if seen.metrics_step is not None else ""
        rows.append(("metrics", _text(", ".join(told) + (f" and {more} more" if more > 0 else "") + at)))
    return rows


def _phases(seen: Snapshot) -> list[tuple[str, RenderableType]]:
    apart = [f"{name} {words.percent(value.value)} of the run"
             for name, value in (("evaluation", seen.evaluation), ("checkpoints", seen.checkpoint))
             if value.or_else(0.0) > 0]  # fmt: skip
    rows: list[tuple[str, RenderableType]] = []
    if seen.phases:
        shares = [(name, share.or_else(0.0)) for name, share in seen.phases.items()]
        rows.append(("a step", Stack(shares)))
        rows.append(("", Legend([item for item in shares if item[1] >= 0.005])))
    else:
        rows.append(("a step", _text("phases unknown: this run is not timed inside its steps", "dim")))
    if apart:
        rows.append(("beside", _join(apart)))
    return rows


# ----------------------------------------------------------------------------------------------------- the machine


def _machine(seen: Snapshot, resources: Resources | None) -> list[tuple[str, RenderableType]]:
    if resources is None or not resources.samples:
        return [("machine", _text("unknown: nothing is recorded of the resources of this run", "dim"))]
    samples = resources.samples[-400:]
    rows: list[tuple[str, RenderableType]] = []
    if seen.sample_old:
        told = f"last looked at {words.duration(seen.sample_age)} ago: these figures are old"
        rows.append(("machine", _text(told, "bold yellow")))
    rows.append(("cpu", Meter(_clipped(seen.cpu_share), _cpu(seen), _cpu_history(samples, seen.cores))))
    rows += [
        (f"gpu {place}", Meter(_clipped(gpu.utilisation), _gpu(gpu), [
            item.gpus[place].utilisation if place < len(item.gpus) else None for item in samples
        ], "green"))
        for place, gpu in enumerate(seen.gpus[:MOST_GPUS])
    ]  # fmt: skip
    if len(seen.gpus) > MOST_GPUS:
        rows.append(("", _text(f"and {len(seen.gpus) - MOST_GPUS} more accelerators, in the report", "dim")))
    share, told = _memory(seen)
    rows.append(("memory", Meter(share, told, [item.memory for item in samples], "magenta")))
    rows.append(("disk", _join((
        f"read {_value(seen.read)}", f"written {_value(seen.written)}",
        f"{_value(seen.disk_free)} free" if words.known(seen.disk_free) else "",
    ))))  # fmt: skip
    rows.append(("network", _text(f"received {_value(seen.received)} · sent {_value(seen.sent)} (whole machine)")))
    if seen.swapped.or_else(0.0) > 0:
        rows.append(("swap", _text(f"{_value(seen.swapped)}: memory is short", "bold yellow")))
    rows.append(("power", _join((_watts(seen.watts), *_heat(seen.temperature, seen.clock, seen.clock_most)))))
    return rows


def _cpu(seen: Snapshot) -> str:
    parts = [f"{words.percent(seen.cpu_share.value)} of {words.number(seen.cores)} cores"]
    if not words.known(seen.cpu_share):
        parts = [f"{words.three(seen.cpu.or_else(0.0)):g} cores busy" if words.known(seen.cpu) else words.UNKNOWN]
    if words.known(seen.machine_share) and words.known(seen.cpu_share):
        others = seen.machine_share.or_else(0.0) - seen.cpu_share.or_else(0.0)
        if others >= 0.05:
            parts.append(f"other work {words.percent(round(others, 2))}")
    if seen.processes is not None and seen.processes > 1:
        parts.append(f"{seen.processes:,} processes")
    if seen.threads is not None:
        parts.append(f"{seen.threads:,} threads")
    return " · ".join(parts)


def _gpu(gpu: GpuNow) -> str:
    used = _value(gpu.memory)
    if words.known(gpu.memory_total):
        used += f" of {_value(gpu.memory_total)}"
    parts = [
        _value(gpu.utilisation),
        f"memory {used}",
        _watts(gpu.watts),
        *_heat(gpu.temperature, gpu.clock, gpu.clock_most.value),
        words.clean(gpu.name, 60),
    ]
    if gpu.throttled:
        parts.append(f"held down: {words.clean(', '.join(gpu.throttled), 200)}")
    return " · ".join(part for part in parts if part)


def _memory(seen: Snapshot) -> tuple[float | None, str]:
    used, free, limit = seen.memory.value, seen.memory_available, seen.memory_limit
    if not words.known(seen.memory) or used is None:
        return None, words.UNKNOWN
    if limit is not None and limit > 0:
        return min(used / limit, 1.0), f"{_value(seen.memory)} of {words.value_text(limit, 'B')}"
    if words.known(free):
        return used / max(used + free.or_else(0.0), 1.0), f"{_value(seen.memory)}, {_value(free)} still free"
    return None, _value(seen.memory)


def _heat(temperature: Quantity, clock: Quantity, most: float | None) -> list[str]:
    found = []
    if words.known(temperature):
        found.append(f"{temperature.or_else(0.0):.0f} °C")
    if words.known(clock):
        top = f" of {units.si(words.three(most), 'Hz')}" if words.finite(most) else ""
        found.append(units.si(words.three(clock.or_else(0.0)), "Hz") + top)
    return found


def _watts(watts: Quantity) -> str:
    if not words.known(watts):
        return "power unknown"
    return f"{words.three(watts.or_else(0.0)):g} W" + (" (estimated)" if watts.basis == "estimated" else "")


def _value(quantity: Quantity) -> str:
    return words.value_text(quantity.value, quantity.unit) if words.known(quantity) else words.UNKNOWN


def _clipped(share: Quantity) -> float | None:
    return None if share.value is None else min(max(share.value, 0.0), 1.0)


def _cpu_history(samples: Sequence[Sample], cores: float | None) -> list[float | None]:
    found: list[float | None] = []
    for a, b in pairwise(samples):
        used, span = (b.cpu_seconds, a.cpu_seconds), b.at - a.at
        if used[0] is None or used[1] is None or span <= 0 or used[0] < used[1]:
            found.append(None)
        else:
            found.append((used[0] - used[1]) / span / (cores or 1.0))
    return found


def _books(moment: Moment) -> list[tuple[str, RenderableType]]:
    ledger = moment.ledger
    if ledger is None:
        return [("cost", _text("unknown: nothing was counted", "dim"))]
    rows: list[tuple[str, RenderableType]] = []
    for field in ledger_words.SHORT:
        figure, how = ledger_words.parts(field, getattr(ledger, field), ledger.currency, 160)
        told = _text(figure)
        told.append(f" ({how})" if how else "", style="dim")
        rows.append((ledger_words.LABELS[field], told))
    return rows
