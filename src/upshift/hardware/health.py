"""What of this machine stands in the way of training, or of trials that can be believed, and what mends it.

Nothing is changed and nothing is run but imports. Limits: /dev/shm and cgroups are those of Linux.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from upshift.hardware import machine
from upshift.units import binary

State = Literal["ok", "note", "wrong"]

#: Versions of torch below this are not supported.
LEAST_TORCH = (2, 10)
#: Bytes of room below which trials fail, and below which caches and checkpoints of two arms may not fit.
LEAST_ROOM, SOME_ROOM = 256 * 2**20, 2 * 2**30
#: Bytes of shared memory that loader workers fill soon: what containers get by default.
LITTLE_SHARED = 64 * 2**20


class Check(msgspec.Struct, frozen=True):
    """One thing looked at. `note` could be better; `wrong` gives failures or wrong figures. `mend` is a command."""

    name: str
    state: State
    found: str
    why: str
    mend: str = ""


class Health(msgspec.Struct, frozen=True):
    """All checks of a machine."""

    checks: tuple[Check, ...]

    def wrong(self) -> tuple[str, ...]:
        """Names of the checks that found something wrong."""
        return tuple(check.name for check in self.checks if check.state == "wrong")


def torch_build() -> Check:
    """Which torch is installed, and what it was built with."""
    why = "Training runs on it; upshift leaves it as it is."
    mend = "pip install 'upshift[torch]'"
    try:
        import torch
    except Exception as error:  # a broken build raises anything, and that is what is looked for here
        return Check("torch", "wrong", f"cannot be imported: {error}", why, mend)
    parts = torch.__version__.split("+")[0].split(".")
    version = tuple(int(part) for part in parts[:2] if part.isdigit())
    backends: Any = torch.backends
    built = [name for name, there in (("MKL", backends.mkl), ("oneDNN", backends.mkldnn)) if there.is_available()]
    found = f"{torch.__version__}, with {' and '.join(built) or 'neither MKL nor oneDNN'}"
    if version < LEAST_TORCH:
        return Check("torch", "wrong", found, f"upshift needs {'.'.join(map(str, LEAST_TORCH))} or later.", mend)
    if not built:
        return Check("torch", "note", found, "Without them matrix products on the CPU are slow.", mend)
    return Check("torch", "ok", found, why)


def processor(root: Path = Path("/")) -> Check:
    """The processor, and whether it multiplies bfloat16 in hardware."""
    features = machine.cpu_features(root)
    kinds = [name for name in ("amx_bf16", "avx512_bf16", "svebf16", "bf16") if name in features]
    native = f"bf16 in hardware ({', '.join(kinds)})" if kinds else "no bf16 in hardware"
    why = "bf16 is the largest gain there is on a CPU." if kinds else "Here bf16 is emulated, and seldom faster."
    return Check("processor", "ok", f"{machine.cpu_model(root)}; {native}", why)


def cores(root: Path = Path("/"), affinity: int | None = None) -> Check:
    """Cores this process may use, against those of the machine.

    Args:
        affinity: number of cores the scheduler allows; None asks it.
    """
    allowed = affinity if affinity is not None else len(os.sched_getaffinity(0))
    quota = machine.cpu_quota(root)
    found = f"{allowed} of {os.cpu_count() or 'unknown'} by affinity" + (
        f", {quota:.3g} by the quota of the control group" if quota is not None else ", no quota"
    )
    if quota is not None and quota < allowed:
        return Check(
            "cores", "wrong" if quota < allowed / 2 else "note", found,
            "torch starts a thread for every core it sees; above the quota all of them are held up together.",
            f"export OMP_NUM_THREADS={max(int(quota), 1)}",
        )  # fmt: skip
    return Check("cores", "ok", found, "More threads than cores hold each other up.")


def openmp(env: Mapping[str, str], usable: int) -> Check:
    """The OpenMP settings of the environment against `usable` cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY",
             "KMP_AFFINITY", "KMP_BLOCKTIME")  # fmt: skip
    given = {name: env[name] for name in names if env.get(name)}
    found = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing is set"
    for name in names[:2]:
        if given.get(name, "").isdigit() and int(given[name]) > usable:
            return Check("OpenMP", "wrong", found, f"{given[name]} threads share {usable} cores.", f"unset {name}")
    for name in names[:2]:
        if given.get(name, "").isdigit() and int(given[name]) < usable:
            return Check(
                "OpenMP", "note", found, f"Only {given[name]} of {usable} cores are used by one training process.",
                f"unset {name}",
            )  # fmt: skip
    bound = next((name for name in names[3:6] if name in given), "")
    if bound and given[bound].lower() not in ("false", "none", "disabled"):
        why = "Loader workers inherit the cores threads are bound to."
        return Check("OpenMP", "note", found, why, f"unset {bound}")
    return Check("OpenMP", "ok", found, "These variables decide how many threads compute, and where.")


def compiler(there: bool) -> Check:
    """Whether torch.compile can build for the CPU."""
    why = "torch.compile builds its kernels with a C++ compiler; without one it is not tried on the CPU."
    if there:
        return Check("compiler", "ok", "a C++ compiler was found", why)
    return Check("compiler", "note", "no C++ compiler was found", why, "apt-get install g++")


def room(folder: str, free: int) -> Check:
    """Free bytes of the folder for temporary files."""
    why = "What trials write goes there, a cache and the checkpoints of two runs among it."
    found = f"{binary(free)} free in {folder}"
    state: State = "wrong" if free < LEAST_ROOM else "note" if free < SOME_ROOM else "ok"
    mend = "" if state == "ok" else "export TMPDIR=/a/folder/with/room"
    return Check("temporary files", state, found, why, mend)


def shared_memory(size: int | None) -> Check:
    """Bytes of /dev/shm; None where there is none."""
    why = "Loader workers hand batches over through it; when it is full they die with a bus error."
    if size is None:
        return Check("shared memory", "note", "there is no /dev/shm", why)
    state: State = "wrong" if size <= LITTLE_SHARED else "note" if size < 2**30 else "ok"
    mend = "" if state == "ok" else "mount -o remount,size=2g /dev/shm    (docker: run --shm-size=2g)"
    return Check("shared memory", state, f"{binary(size)} in /dev/shm", why, mend)


def isolation(rung: str, problem: str = "") -> Check:
    """The rung of isolation trials get; empty where there is none, with the `problem`."""
    why = "Trials must not touch your files."
    if not rung:
        return Check("isolation", "wrong", problem, why, "export TMPDIR=/a/folder/on/a/local/disk")
    if rung == "overlay":
        return Check("isolation", "ok", "overlay: a copy-on-write view of the file system", why)
    limits = "what C code and child processes write elsewhere "
    limits += "fails" if rung == "landlock" else "is not redirected"
    return Check(
        "isolation", "note", f"{rung}: {limits}", why,
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0    (docker: run --security-opt seccomp=unconfined)",
    )  # fmt: skip


def allocators(found: Mapping[str, str]) -> Check:
    """Memory allocators that could be loaded: name -> path of the library."""
    why = "Another allocator saves page faults where tensors are large; glibc's own settings do so in part."
    if found:
        return Check("allocators", "ok", ", ".join(f"{name} ({path})" for name, path in found.items()), why)
    return Check("allocators", "note", "neither tcmalloc nor jemalloc", why, "apt-get install libtcmalloc-minimal4")


def look(rung: str, problem: str, libraries: Mapping[str, str]) -> Health:
    """All checks of this machine.

    Args:
        rung, problem: see `isolation`; libraries: see `allocators`.
    """
    folder = tempfile.gettempdir()
    shared = Path("/dev/shm")
    return Health(
        (
            torch_build(),
            processor(),
            cores(),
            openmp(os.environ, machine.usable_cores()),
            compiler(machine.has_compiler()),
            room(folder, shutil.disk_usage(folder).free),
            shared_memory(shutil.disk_usage(shared).total if shared.is_dir() else None),
            isolation(rung, problem),
            allocators(libraries),
        )
    )
