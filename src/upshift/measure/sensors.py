"""Temperature and clock of the processor, from the files Linux shows them in. What is not shown is not guessed.

Source: Linux, Documentation/hwmon/sysfs-interface.rst (millidegrees), driver-api/thermal, admin-guide/pm/cpufreq.rst
(kHz). `cpu MHz` of /proc/cpuinfo is left alone: a virtual machine shows a constant there, and on large machines
reading it wakes every core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

#: hwmon drivers of processors, and words in the names of thermal zones that lie in one.
_DRIVERS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
_ZONES = ("pkg", "cpu", "soc")

#: More files than that are not read at every look.
MOST_FILES = 8


class Thermometer:
    """The hottest sensor of the processor."""

    def __init__(self, root: Path = Path("/")) -> None:
        found = []
        for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
            if _text(folder / "name") in _DRIVERS:
                # Of a package, the first sensor is the whole of it; the others are its cores.
                found += sorted(folder.glob("temp1_input"))
        if not found:
            for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
                if any(word in _text(folder / "type").lower() for word in _ZONES):
                    found.append(folder / "temp")
        self._files = found[:MOST_FILES]

    def celsius(self) -> float | None:
        """Degrees; None where no sensor is shown, or it says nothing sensible."""
        values = [value / 1e3 for path in self._files if (value := _number(path)) is not None]
        return max((value for value in values if -50.0 < value < 150.0), default=None)


class Clock:
    """The clock of some cores, evenly spread over those that may be used.

    Args:
        cores: numbers of the cores that may be used.
        busy: how many of them can be busy at a time (a quota may allow fewer); the fastest so many count.
    """

    def __init__(self, cores: Iterable[int], busy: float, root: Path = Path("/")) -> None:
        base = root / "sys/devices/system/cpu"
        paths = [base / f"cpu{core}" / "cpufreq" for core in sorted(cores)]
        step = max(math.ceil(len(paths) / MOST_FILES), 1)
        self._folders = [path for path in paths[::step] if (path / "scaling_cur_freq").exists()]
        share = busy / max(len(paths), 1)
        self._busy = max(math.ceil(share * len(self._folders)), 1)

    def hertz(self) -> float | None:
        """Mean of the cores read; None where the system does not say."""
        values = [value for path in self._folders if (value := _number(path / "scaling_cur_freq")) is not None]
        fastest = sorted(values, reverse=True)[: self._busy]
        return 1e3 * sum(fastest) / len(fastest) if fastest else None

    def most(self) -> float | None:
        """The highest clock these cores can have."""
        values = [value for path in self._folders if (value := _number(path / "cpuinfo_max_freq")) is not None]
        return 1e3 * max(values) if values else None


def usable_cpus() -> list[int]:
    """Numbers of the cores this process may run on."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
