"""Energy counters of the hardware: RAPL for processors, NVML for NVIDIA GPUs.

Both count a whole chip: other work on it is in the figure. Neither is ever asked for with more rights than the person
has. Sources: Linux, Documentation/power/powercap (energy_uj counts microjoules and begins anew at
max_energy_range_uj); NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded,
from Volta on).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from upshift._optional import require
from upshift.errors import EnvironmentError_

POWERCAP = Path("/sys/class/powercap")

#: A package is `intel-rapl:0`, a part of it `intel-rapl:0:1`; AMD processors have the same names.
_PACKAGE = re.compile(r"intel-rapl:\d+")
_PART = re.compile(r"intel-rapl:\d+:\d+")

#: Joules since a run began, None where they are not known.
Read = Callable[[], float | None]

OTHER_WAY = "Compare times instead: --objective time-to-target."


class Counter(Protocol):
    """Something that counts joules. `what` says in words what is counted, and how."""

    @property
    def what(self) -> str: ...

    def begin(self, pid: int) -> Read:
        """Count from now on, for the process tree of `pid` where the counter can tell processes apart."""


class Rapl:
    """The processor packages, and their memory where it has a counter of its own."""

    def __init__(self, zones: Sequence[tuple[Path, str, int]]) -> None:
        """
        Args:
            zones: folder, name and range in microjoules of each counter.
        """
        self._zones = tuple(zones)

    @classmethod
    def here(cls, root: Path = POWERCAP) -> Rapl | None:
        """All packages of this machine; None unless every one of them can be read by this user."""
        zones = []
        for folder in sorted(root.glob("intel-rapl:*")):
            package, part = _PACKAGE.fullmatch(folder.name), _PART.fullmatch(folder.name)
            try:
                name = (folder / "name").read_text().strip()
                # `psys` is the whole platform, cores are part of their package: both would be counted twice.
                if not (package and name.startswith("package")) and not (part and name == "dram"):
                    continue
                _microjoules(folder)
                zones.append((folder, name, int((folder / "max_energy_range_uj").read_text())))
            except (OSError, ValueError):
                return None
        packages = any(name.startswith("package") for _, name, _ in zones)
        return cls(zones) if packages and all(most > 0 for _, _, most in zones) else None

    @property
    def what(self) -> str:
        """The counters by name."""
        names = ", ".join(name for _, name, _ in self._zones)
        return f"the processor by RAPL ({names}), other work on it included"

    def begin(self, pid: int) -> Read:
        """Count from now on. To be read at least once while a counter goes round, which takes minutes."""
        last = [_or_none(folder) for folder, _, _ in self._zones]
        total = 0.0

        def joules() -> float | None:
            nonlocal total
            for place, (folder, _, most) in enumerate(self._zones):
                before, now = last[place], _or_none(folder)
                if before is None or now is None:
                    last[place] = None  # a gap cannot be filled later
                    return None
                total += (now - before if now >= before else now - before + most) / 1e6
                last[place] = now
            # A virtual machine may show counters that stand still: they have measured nothing.
            return total if total > 0.0 else None

        return joules


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _or_none(zone: Path) -> int | None:
    try:
        return _microjoules(zone)
    except (OSError, ValueError):
        return None


class Nvml:
    """The NVIDIA GPUs a training may use."""

    def __init__(self, library: Any, devices: Sequence[Any]) -> None:
        self._library = library
        self._devices = tuple(devices)

    @classmethod
    def here(cls, visible: str | None) -> Nvml:
        """The GPUs that `visible` (the value of CUDA_VISIBLE_DEVICES) leaves; None: all of them.

        Where indices are given, NVML's order (that of the bus) is used.

        Raises:
            MissingExtraError: nvidia-ml-py is not installed.
            EnvironmentError_: no driver, no GPU, or one without an energy counter.
        """
        library = require("pynvml", extra="energy", why="measuring the energy of a GPU")
        try:
            library.nvmlInit()
            if visible is None:
                devices = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
            else:
                devices = [_device(library, word.strip()) for word in visible.split(",") if word.strip()]
            for device in devices:
                library.nvmlDeviceGetTotalEnergyConsumption(device)
        except library.NVMLError as error:
            raise EnvironmentError_(f"the energy of the GPU cannot be read: {error}.", remedy=OTHER_WAY) from None
        if not devices:
            raise EnvironmentError_("the energy of the GPU cannot be read: NVML sees none.", remedy=OTHER_WAY)
        return cls(library, devices)

    @property
    def what(self) -> str:
        """How many GPUs."""
        n = len(self._devices)
        return f"{n} GPU{'s' if n > 1 else ''} by NVML, other work on {'them' if n > 1 else 'it'} included"

    def begin(self, pid: int) -> Read:
        """Count from now on."""
        try:
            first: int | None = self._millijoules()
        except self._library.NVMLError:
            first = None

        def joules() -> float | None:
            try:
                return None if first is None else (self._millijoules() - first) / 1e3
            except self._library.NVMLError:
                return None

        return joules

    def _millijoules(self) -> int:
        return sum(int(self._library.nvmlDeviceGetTotalEnergyConsumption(device)) for device in self._devices)


def _device(library: Any, word: str) -> Any:
    if word.isdecimal():
        return library.nvmlDeviceGetHandleByIndex(int(word))
    return library.nvmlDeviceGetHandleByUUID(word)
