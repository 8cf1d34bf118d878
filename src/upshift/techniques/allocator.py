"""Another memory allocator for the process, or the C library's with settings for large tensors.

Idea: glibc returns the memory of large freed tensors to the kernel and asks for it again in the next step. Each time
the kernel clears the pages and the process faults them in one by one. tcmalloc and jemalloc keep freed memory; glibc
does so too when told (no mmap for single blocks, no trimming, huge pages by advice).
Limits: the process holds on to its peak memory. Linux with glibc only; the libraries must be installed. The variables
are read when a process starts, so nothing can be switched while it runs. Children of the process inherit them.

Sources: PyTorch performance tuning guide ("Switch memory allocator"); mallopt(3); glibc manual, "Memory Allocation
Tunables"; github.com/google/tcmalloc and jemalloc TUNING.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, ProcessEnv, Verdict
from upshift.sites.environment import EnvironmentApplied
from upshift.sites.protocol import SettingSpec

KINDS = ("tcmalloc", "jemalloc", "glibc")

#: Shared libraries by kind, best first.
_LIBRARIES = {
    "tcmalloc": ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc_minimal.so", "libtcmalloc.so"),
    "jemalloc": ("libjemalloc.so.2", "libjemalloc.so"),
}

_PRELOADED = ("tcmalloc", "jemalloc", "mimalloc", "hoard", "tbbmalloc", "rpmalloc", "snmalloc")

#: Variables that go with a kind; one that the user has set keeps the user's value.
_COMPANIONS = {
    # Without it, each allocation above 1 GiB writes a report to the script's stderr.
    "tcmalloc": {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**40)},
    # Freed pages stay with the process, as in the PyTorch tuning guide.
    "jemalloc": {"MALLOC_CONF": "oversize_threshold:0,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"},
}

#: mallopt(3): no block gets a mapping of its own, the heap's end is kept, and it grows 64 MiB at a time.
_GLIBC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
_GLIBC_TUNABLE = "glibc.malloc.hugetlb=1"

_GLIBC_FAMILY = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad", "hugetlb")


def glibc_version() -> tuple[int, int] | None:
    """Version of the C library this interpreter runs on; None unless it is glibc on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) if name == "glibc" else None
    except (AttributeError, ValueError, OSError):
        return None


def find_library(kind: str, env: Mapping[str, str]) -> Path | None:
    """The shared library of `kind`, from the active environment's `lib`, the loader's cache or the usual folders.

    A library for another architecture is passed over: the loader would only warn and go on without it.
    """
    names = _LIBRARIES[kind]
    prefixes = [env.get("CONDA_PREFIX", ""), env.get("VIRTUAL_ENV", ""), sys.prefix]
    folders = [Path(prefix) / "lib" for prefix in prefixes if prefix]
    folders += [Path(item) for item in env.get("LD_LIBRARY_PATH", "").split(":") if item]
    cached = _loader_cache()
    usual = [Path(root) / name for root in ("/usr/lib", "/usr/local/lib", "/lib") for name in ("", _triplet())]
    usual += [Path("/usr/lib64"), Path("/usr/local/lib64"), Path("/home/linuxbrew/.linuxbrew/lib")]
    for name in names:
        found = [folder / name for folder in folders]
        found += [Path(path) for path in cached.get(name, ())]
        found += [folder / name for folder in usual]
        for path in found:
            # LD_PRELOAD separates its entries by colons and blanks and knows no quoting.
            if path.is_file() and _same_architecture(path) and not any(char in str(path) for char in ": \t"):
                return path.absolute()
    return None


def _triplet() -> str:
    return str(getattr(sys.implementation, "_multiarch", ""))


def _loader_cache() -> dict[str, list[str]]:
    tool = shutil.which("ldconfig") or next((path for path in ("/sbin/ldconfig",) if Path(path).exists()), None)
    if tool is None:
        return {}
    try:
        listing = subprocess.run([tool, "-p"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    result: dict[str, list[str]] = {}
    for line in listing.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow:
            result.setdefault(name.split(" ")[0], []).append(path)
    return result


def _elf(path: Path) -> bytes:
    """Class, byte order and machine of an ELF file; empty for anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return b""
    return head[4:6] + head[18:20] if head[:4] == b"\x7fELF" else b""


def _same_architecture(path: Path) -> bool:
    return bool(_elf(path)) and _elf(path.resolve()) == _elf(Path(sys.executable).resolve())


def _tuned_by_user(env: Mapping[str, str]) -> str:
    """The variable by which the user has tuned glibc's allocator already, or the empty string."""
    for name in _GLIBC_FAMILY:
        variable = f"MALLOC_{name.upper()}_"
        if env.get(variable):
            return variable
    tunables = env.get("GLIBC_TUNABLES", "")
    return "GLIBC_TUNABLES" if any(f"glibc.malloc.{name}" in tunables for name in _GLIBC_FAMILY) else ""


def predicted_gain(faults: float | None, each: float | None, step: float | None) -> tuple[float | None, str]:
    """Speed-up of the step if half of its page faults were gone, and what that rests on.

    Args:
        faults: minor page faults of a step; None where they were not counted.
        each: seconds one costs; None where that was not measured.
        step: seconds of a step.
    """
    if faults is None or each is None or not step:
        return None, "page faults were not counted"
    share = min(0.5 * faults * each / step, 0.5)
    return 1.0 / (1.0 - share), f"half of {faults:,.0f} page faults a step, {each * 1e6:.2g} us each"


class Allocator:
    """tcmalloc or jemalloc by LD_PRELOAD, or glibc's allocator with settings for large tensors."""

    card: ClassVar[Card] = Card(
        name="allocator",
        summary="Keeps the memory of freed tensors in the process instead of returning it to the kernel every step.",
        source="PyTorch performance tuning guide (tcmalloc, jemalloc); mallopt(3); glibc manual, malloc tunables",
        sites=("process_env",),
        numerics=Numerics.BITWISE,
        switchable="process",
        targets=("forward", "backward", "optimizer"),
        details="Variables the user has set win. The process keeps its peak memory. Child processes inherit it.",
        settings={
            "kind": SettingSpec(
                default="glibc",
                doc="tcmalloc or jemalloc where installed; glibc needs nothing",
                choices=KINDS,
            )
        },
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Where a tensor lies in memory does not enter its value."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies to training on the CPU with the C library's own allocator."""
        facts = seen.facts
        if not facts.device.startswith("cpu"):
            return Verdict(applies=False, reason=f"tensors live on {facts.device}, which has its own caching allocator")
        using = facts.allocator.lower()
        other = next((name for name in _PRELOADED if name in using), "")
        if other:
            return Verdict(applies=False, reason=f"the process runs on {other} already")
        gain, rests_on = predicted_gain(facts.page_faults, facts.fault_seconds, seen.anatomy.step.value)
        return Verdict(
            applies=True,
            reason="large tensors are returned to the kernel and faulted in again every step",
            gain=gain,
            rests_on=rests_on,
            # All three keep freed memory; glibc's settings need nothing installed.
            candidates=({"kind": "glibc"}, {"kind": "tcmalloc"}, {"kind": "jemalloc"}),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Adds to the environment of the process to be started."""
        if not isinstance(moment, ProcessEnv):
            return None
        env = moment.env
        version = glibc_version()
        if version is None:
            return NoEffect("allocators are exchanged on Linux with glibc only")
        preloaded = env.get("LD_PRELOAD", "")
        other = next((name for name in _PRELOADED if name in preloaded), "")
        if other:
            return NoEffect(f"LD_PRELOAD loads {other} already")
        kind = str(settings.get("kind", "glibc"))
        if kind == "glibc":
            return self._glibc(env, version)
        library = find_library(kind, env)
        if library is None:
            return NoEffect(f"{kind} is not installed ({_LIBRARIES[kind][0]} was not found)")
        values = {"LD_PRELOAD": f"{library}:{preloaded}" if preloaded else str(library)}
        values.update({name: value for name, value in _COMPANIONS[kind].items() if name not in env})
        return EnvironmentApplied(env, values, f"memory comes from {kind} ({library})")

    def _glibc(self, env: dict[str, str], version: tuple[int, int]) -> Applied | NoEffect:
        if theirs := _tuned_by_user(env):
            return NoEffect(f"{theirs} is set already, and the user's value wins")
        values = dict(_GLIBC)
        note = "glibc keeps freed memory (no mmap per block, no trimming)"
        if version >= (2, 35):
            tunables = env.get("GLIBC_TUNABLES", "")
            values["GLIBC_TUNABLES"] = f"{tunables}:{_GLIBC_TUNABLE}" if tunables else _GLIBC_TUNABLE
            note += ", huge pages by advice"
        return EnvironmentApplied(env, values, note)
