"""The name of the device a plan belongs to, without importing torch."""

from __future__ import annotations

from pathlib import Path

from upshift.hardware.machine import cpu_model, usable_cores

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_NODES = Path("/dev")


def device_name(kind: str) -> str:
    """`cpu AMD EPYC, 2 cores`, `cuda NVIDIA H200`. An accelerator whose name cannot be read is its kind alone."""
    base = kind.partition(":")[0]
    if base == "cpu":
        return f"cpu {cpu_model()}, {usable_cores()} cores"
    if base == "cuda" and _NVIDIA.is_dir():
        for information in sorted(_NVIDIA.glob("*/information")):
            for line in information.read_text().splitlines():
                if line.startswith("Model:"):
                    return f"cuda {line.partition(':')[2].strip()}"
    return base


def kinds_here() -> tuple[str, ...]:
    """Device kinds a plan could be for on this machine."""
    described = _NVIDIA.is_dir() and any(_NVIDIA.iterdir())
    # Some containers get the device without its description; the device is then `cuda` without a name.
    return ("cuda", "cpu") if described or any(_NODES.glob("nvidia[0-9]*")) else ("cpu",)
