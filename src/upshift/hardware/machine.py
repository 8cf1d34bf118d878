"""What this process may really use of the machine: cores, memory, instruction sets. Standard library and psutil only.

Inside a container the limits of its control group count, not the host's figures. Both cgroup versions are read; every
function takes the filesystem root it reads from, so that recorded trees can be read back.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

_ROOT = Path("/")

#: A v1 group without a limit reports the largest page-aligned 64-bit number; no machine has that much memory.
NO_LIMIT = 2**60


def small_text(path: Path) -> str:
    """The text of a small file, or the empty string where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _own_groups(root: Path) -> dict[str, str]:
    """Controller -> path of this process's control group; the key of the unified (v2) hierarchy is the empty string."""
    groups: dict[str, str] = {}
    for line in small_text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                groups[controller.removeprefix("name=")] = parts[2]
    return groups


def group_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group and of its ancestors, for a v1 controller or (empty name) for v2.

    In a container the path in `/proc/self/cgroup` may be the host's, which is not mounted here: folders that are not
    there are passed over, and the mount itself is always looked at.
    """
    groups = _own_groups(root)
    base = root / "sys/fs/cgroup"
    mounts = [base / controller] if controller else [base, base / "unified"]
    if controller == "cpu":
        mounts.append(base / "cpu,cpuacct")
    relative = Path(groups.get(controller, "/").lstrip("/"))
    found = []
    for mount in mounts:
        for part in (relative, *relative.parents):
            if ".." in part.parts:
                continue
            folder = mount / part
            if folder.is_dir() and folder not in found:
                found.append(folder)
    return found


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPU time this process may use per second of wall time, in cores; None where there is no quota."""
    quotas = []
    for folder in group_folders(root, ""):
        parts = small_text(folder / "cpu.max").split()
        if len(parts) == 2 and parts[0].isdecimal() and parts[1].isdecimal() and int(parts[1]) > 0:
            quotas.append(int(parts[0]) / int(parts[1]))
    for folder in group_folders(root, "cpu"):
        quota, period = small_text(folder / "cpu.cfs_quota_us"), small_text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def usable_cores(root: Path = _ROOT) -> int:
    """Logical cores this process can keep busy: the CPU affinity, cut by the group's quota (rounded up), at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    return max(1, cores)


def memory_limit(root: Path = _ROOT) -> int:
    """Bytes of memory this process may use: the machine's memory, cut by the limits of its control group."""
    limits = [int(psutil.virtual_memory().total)]
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for folder in group_folders(root, controller):
            text = small_text(folder / name)
            if text.isdecimal() and 0 < int(text) < NO_LIMIT:
                limits.append(int(text))
    return min(limits)


def cpu_features(root: Path = _ROOT) -> frozenset[str]:
    """Instruction set flags of the first processor (`avx2`, `avx512_bf16`, `amx_bf16`; `bf16` on ARM).

    Empty where the system does not say (not Linux).
    """
    for line in small_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def bf16_native(root: Path = _ROOT) -> bool | None:
    """Whether the processor multiplies bfloat16 in hardware; None where its features cannot be read."""
    features = cpu_features(root)
    if not features:
        return None
    return bool(features & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"})


def compiler_name(env: Mapping[str, str] | None = None) -> str:
    """The C++ compiler that inductor starts for the CPU: `$CXX` where it is set, else g++ (clang++ on macOS).

    All of CXX is the name of one program there (`torch/_inductor/config.py`, `cpp.cxx`): one with arguments, such as
    `ccache g++`, is not found, nor is an empty one. No other compiler is tried.
    """
    default = "clang++" if sys.platform == "darwin" else "g++"
    return (os.environ if env is None else env).get("CXX", default)


def has_compiler(env: Mapping[str, str] | None = None) -> bool:
    """Whether the compiler that inductor starts is there."""
    name = compiler_name(env)
    return bool(name) and shutil.which(name, path=(os.environ if env is None else env).get("PATH")) is not None


def cpu_model(root: Path = _ROOT) -> str:
    """The processor's name, or its architecture where the system does not say."""
    for line in small_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "Model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def last_level_cache(root: Path = _ROOT) -> int | None:
    """Bytes of the largest cache the first processor sees; None where the system does not say."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = small_text(path)
        factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
        if factor and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * factor)
    return max(sizes, default=None)


def describe() -> dict[str, str]:
    """This machine in words, for records and reports. Keys: cpu, cores, memory, os, python, bf16, compiler."""
    quota = cpu_quota()
    cores = f"{usable_cores()} usable of {os.cpu_count() or 'unknown'}"
    if quota is not None:
        cores += f" (quota {quota:.3g})"
    native = bf16_native()
    features = cpu_features()
    kind = next((name for name in ("amx_bf16", "avx512_bf16", "bf16", "svebf16") if name in features), "")
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "memory": f"{memory_limit() / 2**30:.1f} GiB",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "bf16": "unknown" if native is None else (f"native ({kind})" if native else "not native"),
        "compiler": "found" if has_compiler() else "not found",
    }
