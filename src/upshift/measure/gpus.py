"""What accelerators do while a run goes on: NVIDIA's by NVML (nvidia-ml-py), AMD's by amdsmi, where installed.

A machine may have more accelerators than the run uses: one counts from when a process of the run is seen on it, or
from when its memory fills while the driver names no process that can be seen from here (in containers it often
cannot). Nothing here raises: what cannot be read is None, and the reason is noted once.

Sources: NVML API reference (utilisation in percent, power in milliwatts, energy in millijoules since the driver was
loaded, clocks in MHz; nvmlClocksEventReasons); AMD SMI Python API reference (memory in MB, energy as accumulator times
resolution in microjoules). The AMD part has not been tried on a device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from upshift.records.quantity import Basis
from upshift.records.resources import GpuSample, PowerLimit

T = TypeVar("T")

#: Bytes by which the memory of an accelerator must grow before it counts as used: less than any CUDA context takes.
USED_FROM = 100e6

#: Bits of NVML's clock event reasons. An idle GPU is not held down.
REASONS = {
    0x2: "its clock was set by a person",
    0x4: "power limit",
    0x8: "slowed down by the hardware",
    0x10: "kept in step with other GPUs",
    0x20: "too hot (software slowdown)",
    0x40: "too hot (hardware slowdown)",
    0x80: "the power supply asks for less",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability limit",
}


class Driver(Protocol):
    """One vendor's library. Every method but `handles` may raise anything."""

    label: str

    def handles(self) -> list[Any]: ...
    def name(self, handle: Any) -> str: ...
    def utilisation(self, handle: Any) -> float: ...
    def memory(self, handle: Any) -> tuple[float, float]: ...
    def watts(self, handle: Any) -> float: ...
    def joules(self, handle: Any) -> float: ...
    def temperature(self, handle: Any) -> float: ...
    def clock(self, handle: Any) -> float: ...
    def clock_most(self, handle: Any) -> float: ...
    def throttled(self, handle: Any) -> tuple[str, ...]: ...
    def pids(self, handle: Any) -> list[int]: ...
    def power_limit(self, handle: Any) -> float: ...
    def power_default(self, handle: Any) -> float: ...
    def power_range(self, handle: Any) -> tuple[float, float]: ...


class _Device:
    """What is remembered of one accelerator."""

    def __init__(self, handle: Any, name: str, memory: float | None, joules: float | None) -> None:
        self.handle = handle
        self.name = name
        self.memory_at_first = memory
        self.joules_at_first = joules
        self.used = False
        self.power: PowerLimit | None = None
        self.clock_most: float | None = None
        self.integral = 0.0
        self.last: tuple[float, float] | None = None


class Gpus:
    """The accelerators of one driver that this run may use, and those it uses."""

    def __init__(self, driver: Driver, handles: Collection[Any], proc: Path = Path("/proc")) -> None:
        self._driver = driver
        self._proc = proc
        self.notes: list[str] = []
        self._devices: list[_Device] = []
        for index, handle in enumerate(handles):
            name = self._try(driver.name, handle) or driver.label
            memory = self._try(driver.memory, handle)
            device = _Device(
                handle, f"{name} ({index})", memory[0] if memory else None, self._try(driver.joules, handle)
            )
            device.clock_most = self._try(driver.clock_most, handle)
            self._devices.append(device)
        self._used: list[_Device] = []
        self._first = True

    @property
    def seen(self) -> int:
        """How many may be used."""
        return len(self._devices)

    @property
    def used(self) -> int:
        """How many the run has been seen on."""
        return len(self._used)

    @property
    def basis(self) -> Basis:
        """`measured` where each of those used has a counter of energy."""
        return "measured" if all(item.joules_at_first is not None for item in self._used) else "estimated"

    @property
    def what(self) -> str:
        """How the energy is known, as a part of a sentence."""
        some = f"{self.used} GPU{'s' if self.used > 1 else ''}"
        others = f"other work on {'them' if self.used > 1 else 'it'} included"
        how = "" if self.basis == "measured" else " (power read at every look, summed over time)"
        return f"{some} by {self._driver.label}{how}, {others}"

    @property
    def power_limits(self) -> tuple[PowerLimit, ...]:
        """Of those used; those whose driver says nothing of it are left out."""
        return tuple(item.power for item in self._used if item.power is not None)

    def _power(self, device: _Device) -> PowerLimit | None:
        now = self._try(self._driver.power_limit, device.handle)
        if now is None:
            return None
        least, most = self._try(self._driver.power_range, device.handle) or (None, None)
        return PowerLimit(device.name, now, self._try(self._driver.power_default, device.handle), least, most)

    def look(self, pids: Collection[int], at: float) -> tuple[GpuSample, ...]:
        """Those used by the processes `pids` so far, in the order they were first seen; `at` in seconds."""
        for device in self._devices:
            if not device.used and self._is_used(device, set(pids)):
                device.used = True
                device.power = self._power(device)
                self._used.append(device)
        self._first = False
        return tuple(self._sample(device, at) for device in self._used)

    def _is_used(self, device: _Device, own: set[int]) -> bool:
        memory = self._try(self._driver.memory, device.handle)
        grown = memory is not None and memory[0] >= (device.memory_at_first or 0.0) + USED_FROM
        if not grown and not self._first:
            return False
        there = self._try(self._driver.pids, device.handle)
        if there is not None and own.intersection(there):
            return True
        # The driver may name processes by numbers of another namespace, or not at all.
        strangers = [pid for pid in there or [] if (self._proc / str(pid)).exists()]
        return grown and not strangers

    def _sample(self, device: _Device, at: float) -> GpuSample:
        driver, handle = self._driver, device.handle
        watts = self._try(driver.watts, handle)
        if watts is not None:
            if device.last is not None:
                device.integral += (at - device.last[0]) * (watts + device.last[1]) / 2.0
            device.last = (at, watts)
        joules: float | None = device.integral if device.last is not None else None
        if device.joules_at_first is not None:
            now = self._try(driver.joules, handle)
            joules = None if now is None else max(now - device.joules_at_first, 0.0)
        memory = self._try(driver.memory, handle)
        return GpuSample(
            name=device.name,
            utilisation=self._try(driver.utilisation, handle),
            memory=memory[0] if memory else None,
            memory_total=memory[1] if memory else None,
            watts=watts,
            joules=joules,
            temperature=self._try(driver.temperature, handle),
            clock=self._try(driver.clock, handle),
            clock_most=device.clock_most,
            throttled=self._try(driver.throttled, handle) or (),
        )

    def _try(self, call: Callable[[Any], T], handle: Any) -> T | None:
        try:
            return call(handle)
        except Exception as error:
            # Old devices lack some of the figures; only what is not "not supported" is worth telling.
            if "support" not in str(error).lower() and not self.notes:
                self.notes.append(f"{self._driver.label} fails: {str(error) or type(error).__name__}")
            return None


def here(visible: str | None, proc: Path = Path("/proc")) -> tuple[Gpus | None, list[str]]:
    """The accelerators that may be used, and what could not be read.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None: all. The driver counts in the order of the bus.
    """
    notes: list[str] = []
    for load in (Nvml.load, Amd.load):
        try:
            driver = load(visible)
            if driver is not None and (handles := driver.handles()):
                return Gpus(driver, handles, proc), notes
        except ModuleNotFoundError:
            if load == Nvml.load and (proc / "driver" / "nvidia").exists():
                notes.append("the GPU cannot be read: pip install nvidia-ml-py")
        except Exception as error:
            # A library without a driver is how a machine without a GPU looks.
            if "not found" not in str(error).lower():
                notes.append(f"the GPU cannot be read: {str(error) or type(error).__name__}")
    return None, notes


class Nvml:
    """NVIDIA, by `pynvml`."""

    label = "NVML"

    def __init__(self, library: Any, visible: str | None) -> None:
        self._library = library
        self._visible = visible

    @classmethod
    def load(cls, visible: str | None) -> Driver | None:
        """May raise anything."""
        library = importlib.import_module("pynvml")
        library.nvmlInit()
        return cls(library, visible)

    def handles(self) -> list[Any]:
        count = self._library.nvmlDeviceGetCount()
        if self._visible is None:
            return [self._library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        found: list[Any] = []
        for word in self._visible.split(","):
            word = word.strip()
            try:
                if word.isdecimal():
                    found.append(self._library.nvmlDeviceGetHandleByIndex(int(word)))
                else:
                    found.append(self._library.nvmlDeviceGetHandleByUUID(word))
            except Exception as error:
                if not any(words in str(error).lower() for words in ("invalid", "not found")):
                    raise
                break  # CUDA sees none from the first on that is not there
        return found

    def name(self, handle: Any) -> str:
        name = self._library.nvmlDeviceGetName(handle)
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def utilisation(self, handle: Any) -> float:
        return float(self._library.nvmlDeviceGetUtilizationRates(handle).gpu) / 100.0

    def memory(self, handle: Any) -> tuple[float, float]:
        found = self._library.nvmlDeviceGetMemoryInfo(handle)
        return float(found.used), float(found.total)

    def watts(self, handle: Any) -> float:
        return float(self._library.nvmlDeviceGetPowerUsage(handle)) / 1e3

    def joules(self, handle: Any) -> float:
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    def temperature(self, handle: Any) -> float:
        return float(self._library.nvmlDeviceGetTemperature(handle, self._library.NVML_TEMPERATURE_GPU))

    def clock(self, handle: Any) -> float:
        return 1e6 * float(self._library.nvmlDeviceGetClockInfo(handle, self._library.NVML_CLOCK_SM))

    def clock_most(self, handle: Any) -> float:
        return 1e6 * float(self._library.nvmlDeviceGetMaxClockInfo(handle, self._library.NVML_CLOCK_SM))

    def throttled(self, handle: Any) -> tuple[str, ...]:
        ask = getattr(self._library, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = int((ask or self._library.nvmlDeviceGetCurrentClocksThrottleReasons)(handle))
        return tuple(words for bit, words in REASONS.items() if bits & bit)

    def pids(self, handle: Any) -> list[int]:
        return [int(item.pid) for item in self._library.nvmlDeviceGetComputeRunningProcesses(handle)]

    def power_limit(self, handle: Any) -> float:
        return float(self._library.nvmlDeviceGetPowerManagementLimit(handle)) / 1e3

    def power_default(self, handle: Any) -> float:
        return float(self._library.nvmlDeviceGetPowerManagementDefaultLimit(handle)) / 1e3

    def power_range(self, handle: Any) -> tuple[float, float]:
        least, most = self._library.nvmlDeviceGetPowerManagementLimitConstraints(handle)
        return float(least) / 1e3, float(most) / 1e3


class Amd:
    """AMD, by `amdsmi`. Fields that a device lacks are "N/A" there, which is no number."""

    label = "AMD SMI"

    def __init__(self, library: Any) -> None:
        self._library = library

    @classmethod
    def load(cls, visible: str | None) -> Driver | None:
        """May raise anything."""
        library = importlib.import_module("amdsmi")
        library.amdsmi_init()
        return cls(library)

    def handles(self) -> list[Any]:
        found = list(self._library.amdsmi_get_processor_handles())
        visible = os.environ.get("ROCR_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
        if visible is None:
            return found
        places = [word.strip() for word in visible.split(",")]
        return [found[int(word)] for word in places if word.isdecimal() and int(word) < len(found)]

    def name(self, handle: Any) -> str:
        return str(self._library.amdsmi_get_gpu_asic_info(handle)["market_name"])

    def utilisation(self, handle: Any) -> float:
        return float(self._library.amdsmi_get_gpu_activity(handle)["gfx_activity"]) / 100.0

    def memory(self, handle: Any) -> tuple[float, float]:
        found = self._library.amdsmi_get_gpu_vram_usage(handle)
        return float(found["vram_used"]) * 2**20, float(found["vram_total"]) * 2**20

    def watts(self, handle: Any) -> float:
        found = self._library.amdsmi_get_power_info(handle)
        values = [found.get(name) for name in ("current_socket_power", "average_socket_power")]
        return float(next(value for value in values if isinstance(value, (int, float))))

    def joules(self, handle: Any) -> float:
        found = self._library.amdsmi_get_energy_count(handle)
        return float(found["energy_accumulator"]) * float(found["counter_resolution"]) / 1e6

    def temperature(self, handle: Any) -> float:
        kind, metric = self._library.AmdSmiTemperatureType, self._library.AmdSmiTemperatureMetric
        return float(self._library.amdsmi_get_temp_metric(handle, kind.HOTSPOT, metric.CURRENT))

    def clock(self, handle: Any) -> float:
        found = self._library.amdsmi_get_clock_info(handle, self._library.AmdSmiClkType.GFX)
        return 1e6 * float(found["clk"] if "clk" in found else found["cur_clk"])

    def clock_most(self, handle: Any) -> float:
        return 1e6 * float(self._library.amdsmi_get_clock_info(handle, self._library.AmdSmiClkType.GFX)["max_clk"])

    def throttled(self, handle: Any) -> tuple[str, ...]:
        return ()

    def pids(self, handle: Any) -> list[int]:
        found = self._library.amdsmi_get_gpu_process_list(handle)
        return [int(item["pid"]) for item in found if isinstance(item, dict)]

    def power_limit(self, handle: Any) -> float:
        # Watts in some releases, microwatts in others, and nothing says which.
        raise NotImplementedError("not supported: the unit of a power cap is not known")

    def power_default(self, handle: Any) -> float:
        return self.power_limit(handle)

    def power_range(self, handle: Any) -> tuple[float, float]:
        return (limit := self.power_limit(handle)), limit
