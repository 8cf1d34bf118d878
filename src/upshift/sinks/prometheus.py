"""The state of a run as a text file for Prometheus: for the textfile collector of node_exporter, or a web server.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/, text, without timestamps, which the collector
refuses. The file is replaced as a whole, so that half of it is never read. Sums begin anew when a run is resumed, as
counters may.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

from upshift.records.resources import Alarm, Head, Sample
from upshift.records.run import Event, Window
from upshift.sinks.feed import Began, Ended, Feed, Item

Kind = Literal["gauge", "counter"]

#: Longer names and texts in labels are cut, and series beyond this many of a family are left out.
MOST_LABEL = 200
MOST_SERIES = 500

#: Families of the machine: the field of `Sample`, kind, help.
_MACHINE: dict[str, tuple[str, Kind, str]] = {
    "cpu_seconds_total": ("cpu_seconds", "counter", "CPU time of the process tree."),
    "memory_bytes": ("memory", "gauge", "Memory of the process tree."),
    "memory_available_bytes": ("memory_available", "gauge", "Memory that may still be taken."),
    "disk_read_bytes_total": ("read", "counter", "Bytes read from disks by the process tree."),
    "disk_written_bytes_total": ("written", "counter", "Bytes written to disks by the process tree."),
    "disk_free_bytes": ("disk_free", "gauge", "Bytes free where the run is recorded."),
    "shm_bytes": ("shm", "gauge", "Bytes used in shared memory."),
    "processes": ("processes", "gauge", "Processes of the tree."),
    "threads": ("threads", "gauge", "Threads of the tree."),
    "temperature_celsius": ("temperature", "gauge", "Temperature of the processor."),
    "energy_joules_total": ("joules", "counter", "Energy since the run began, measured or estimated."),
}
_GPU: dict[str, tuple[str, Kind, str]] = {
    "gpu_utilisation_ratio": ("utilisation", "gauge", "Share of the time in which a kernel ran."),
    "gpu_memory_bytes": ("memory", "gauge", "Memory of the GPU in use."),
    "gpu_memory_total_bytes": ("memory_total", "gauge", "Memory of the GPU."),
    "gpu_power_watts": ("watts", "gauge", "Power of the GPU."),
    "gpu_energy_joules_total": ("joules", "counter", "Energy of the GPU since the run began."),
    "gpu_temperature_celsius": ("temperature", "gauge", "Temperature of the GPU."),
    "gpu_clock_hertz": ("clock", "gauge", "Clock of the GPU."),
}


class Exposition:
    """Families of numbers, each with its labels, as the text that is scraped."""

    def __init__(self, **labels: str) -> None:
        self._common = labels
        self._families: dict[str, tuple[Kind, str, dict[str, float]]] = {}

    def set(self, name: str, kind: Kind, told: str, value: float | None, /, **labels: str) -> None:
        """Set one number of the family `upshift_<name>`; None leaves it as it was."""
        if value is None:
            return
        series = self._families.setdefault(f"upshift_{name}", (kind, told, {}))[2]
        key = _labels({**self._common, **labels})
        if key in series or len(series) < MOST_SERIES:
            series[key] = float(value)

    def add(self, name: str, told: str, more: float, /, **labels: str) -> None:
        """Add to a counter."""
        family = self._families.get(f"upshift_{name}")
        before = family[2].get(_labels({**self._common, **labels}), 0.0) if family else 0.0
        self.set(name, "counter", told, before + more, **labels)

    def text(self) -> str:
        """All families, each with its help and type."""
        lines = []
        for name, (kind, told, series) in self._families.items():
            lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{labels} {_number(value)}" for labels, value in series.items()]
        return "".join(f"{line}\n" for line in lines)


def escape(value: str) -> str:
    """A label's value between its quotes: backslash, quote and line feed are escaped, no more is asked for.

    What UTF-8 cannot hold is replaced, and the end of a long value is cut off.
    """
    whole = value[:MOST_LABEL].encode("utf-8", "replace").decode("utf-8")
    return whole.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels.items()) + "}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


class Prometheus:
    """A sink that keeps `file` at the newest state of the run in `folder`."""

    name = "prometheus"
    opened = True

    def __init__(self, file: Path, folder: Path) -> None:
        self.file = file
        self._feed = Feed(folder)
        self._state = Exposition(run=folder.name)
        self._written = ""

    def poll(self) -> None:
        """Take in one bounded piece of the record, and replace the file where something changed.

        Raises:
            OSError: the file cannot be written.
        """
        self._take(last=False)
        self._write()

    def close(self) -> None:
        """Take in the rest. The file stays, so that the end is scraped, too."""
        self._take(last=True)
        while self._feed.more:
            self._take(last=True)
        self._state.set("running", "gauge", _RUNNING, 0)
        self._write()

    def _take(self, *, last: bool) -> None:
        for item in self._feed.read(last=last):
            self._note(item)

    def _note(self, item: Item) -> None:
        state = self._state
        if isinstance(item, Began):
            state.set("info", "gauge", "What the run is.", 1, script=item.script, plan=item.plan)
            state.set("start_time_seconds", "gauge", "When the run began, Unix time.", self._feed.clock)
            state.set("running", "gauge", _RUNNING, 1)
        elif isinstance(item, Window):
            self._window(item)
        elif isinstance(item, Sample):
            for name, (attribute, kind, told) in _MACHINE.items():
                state.set(name, kind, told, getattr(item, attribute))
            for index, gpu in enumerate(item.gpus):
                for name, (attribute, kind, told) in _GPU.items():
                    state.set(name, kind, told, getattr(gpu, attribute), gpu=str(index), name=gpu.name)
        elif isinstance(item, Alarm):
            state.add("alarms_total", "Alarms raised.", 1, name=item.name)
        elif isinstance(item, Event):
            for metric, value in item.values.items():
                state.set("metric", "gauge", "A metric of the last evaluation.", _or_nan(value), name=metric)
            if not item.values:
                state.add("events_total", "Events of the run.", 1, kind=item.kind)
        elif isinstance(item, Ended):
            state.set("running", "gauge", _RUNNING, 0)
            state.set("exit_code", "gauge", "How the training ended.", item.code)
        elif isinstance(item, Head):
            state.set("cores", "gauge", "Cores that the run may use.", item.cores)
            state.set("memory_limit_bytes", "gauge", "Memory that the run may use.", item.memory_limit)

    def _window(self, item: Window) -> None:
        state = self._state
        state.set("step", "gauge", "Updates so far.", item.first + item.n)
        state.set("loss", "gauge", "Mean loss of the last window of steps.", item.loss)
        rate = item.n / item.seconds if item.seconds > 0 else None
        state.set("steps_per_second", "gauge", "Steps per second of the last window.", rate)
        state.set("last_step_time_seconds", "gauge", "End of the last window, Unix time.", self._feed.wall(item.at))
        told = "Time spent in a phase of training, or in a pause of it."
        for phase, seconds in (*item.phases.items(), ("evaluation", item.evaluation), ("checkpoint", item.checkpoint)):
            state.add("phase_seconds_total", told, max(seconds, 0.0), phase=phase)

    def _write(self) -> None:
        text = self._state.text()
        if text == self._written or not text:
            return
        # Without the ending .prom the collector passes it by.
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, "utf-8")
            # The collector is another user.
            temporary.chmod(0o644)
            temporary.replace(self.file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._written = text


_RUNNING = "1 while the training runs."


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
