"""All checks of this machine, in their groups. What takes seconds goes on at the same time, each in its own process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import psutil

from upshift.hardware import machine
from upshift.hardware.health import (
    accelerator,
    build,
    clock,
    compiler,
    disk,
    environment,
    gpus,
    memory,
    others,
    packages,
    system,
)
from upshift.hardware.health.check import Check, Group, Health, carefully, end_all
from upshift.hardware.probe import cache_file

#: Group, name for where it fails, and the check itself; None: it does not apply here.
Row = tuple[Group, str, Callable[[], Check | None]]
Torch = Callable[[], build.TorchFacts]
Gpus = Callable[[], gpus.Seen]


def look(rung: str, problem: str, libraries: Mapping[str, str], *, quick: bool = False) -> Health:
    """All checks of this machine.

    Args:
        rung, problem: see `environment.isolation`; libraries: see `environment.allocators`;
        quick: leave out what takes seconds: the speed of the disk, the compiler's work, imports of torchvision and
            torchaudio.
    """
    try:
        # What fails in here is raised where the result is asked for, inside one check.
        with ThreadPoolExecutor() as pool:
            torch = pool.submit(build.ask_torch).result
            seen = pool.submit(gpus.look).result
            compiled = pool.submit(_compiler, quick).result
            beside = [_package(name, torch, None if quick else pool) for name in packages.PACKAGES]
    except BaseException:
        end_all()
        raise
    rows = [
        *_machine(torch, seen),
        *_torch(torch, seen),
        *beside,
        ("torch", "compiler", compiled),
        *_accelerator(torch, seen),
        *_memory(),
        *_disk(quick),
        *_environment(),
        ("environment", "isolation", lambda: environment.isolation(rung, problem)),
        ("environment", "allocators", lambda: environment.allocators(libraries)),
    ]
    found = (carefully(name, group, check) for group, name, check in rows)
    return Health(tuple(check for check in found if check is not None))


def _compiler(quick: bool) -> Check:
    return compiler.present(os.environ) if quick else compiler.builds(os.environ)


def _machine(torch: Torch, seen: Gpus) -> list[Row]:
    def nodes() -> list[int]:
        return [slot.node for slot in seen().usable if slot.node is not None]

    return [
        ("machine", "system", system.system),
        ("machine", "processor", system.processor),
        ("machine", "cores", system.cores),
        ("machine", "OpenMP", lambda: system.openmp(os.environ, machine.usable_cores(), torch().threads)),
        ("machine", "NUMA nodes", lambda: system.numa(gpus=nodes())),
        ("machine", "clock", lambda: clock.look(Path(tempfile.gettempdir()))),
    ]


def _torch(torch: Torch, seen: Gpus) -> list[Row]:
    return [
        ("torch", "torch", lambda: build.torch_build(torch())),
        ("torch", "torch installations", lambda: environment.twice(environment.distributions(), torch().version)),
        ("torch", "torch and device", lambda: _device(torch(), seen())),
        ("torch", "vector instructions",
         lambda: build.instructions(torch(), machine.cpu_features(), os.environ)),
        ("torch", "triton", lambda: packages.triton(torch())),
        ("torch", "TensorFlow", lambda: packages.tensorflow(_tensorflow(), seen().any_nvidia, os.environ)),
    ]  # fmt: skip


def _device(facts: build.TorchFacts, seen: gpus.Seen) -> Check | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return build.torch_device(facts, seen.any_nvidia, seen.amd, seen.smi.cuda, visible)


def _tensorflow() -> str | None:
    for name in ("tensorflow", "tensorflow-cpu", "tf-nightly", "intel-tensorflow"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _package(name: str, torch: Torch, pool: ThreadPoolExecutor | None) -> Row:
    version, built_for = packages.installed_package(name)
    if version is None or pool is None:
        return ("torch", name, lambda: packages.package(name, version, built_for, None, torch()))
    loaded = pool.submit(packages.ask_package, name).result
    return ("torch", name, lambda: packages.package(name, version, built_for, loaded(), torch()))


def _accelerator(torch: Torch, seen: Gpus) -> list[Row]:
    return [
        ("accelerator", "GPU", lambda: accelerator.driver(seen(), torch().mps or False)),
        ("accelerator", "AMD GPU", lambda: others.amd(others.look_amd())),
        ("accelerator", "TPU", lambda: others.tpu(others.look_tpu(), torch().version)),
        ("accelerator", "PCIe link", lambda: accelerator.pcie(seen())),
        ("accelerator", "links between GPUs", lambda: accelerator.between(seen())),
        ("accelerator", "persistence mode", lambda: accelerator.persistence(seen())),
        ("accelerator", "GPU memory errors", lambda: accelerator.memory_errors(seen())),
        ("accelerator", "GPU clocks", lambda: accelerator.clocks(seen())),
        ("accelerator", "GPU power limit", lambda: accelerator.power_limit(seen())),
        ("accelerator", "GPU in use", lambda: accelerator.taken(seen())),
        ("accelerator", "locked memory", lambda: _locked(seen())),
    ]


def _locked(seen: gpus.Seen) -> Check | None:
    if not seen.any_nvidia:
        return None
    soft, _ = _limit("RLIMIT_MEMLOCK")
    return memory.locked_memory(soft, seen.infiniband)


def _limit(name: str) -> tuple[int | None, int | None]:
    """The limit in force and the hardest; None: none."""
    import resource

    soft, hard = resource.getrlimit(getattr(resource, name))
    endless = (resource.RLIM_INFINITY, -1)
    return (None if soft in endless else soft), (None if hard in endless else hard)


def _memory() -> list[Row]:
    return [
        ("memory and disk", "memory", _free_memory),
        ("memory and disk", "swap", _swap),
        ("memory and disk", "huge pages", memory.huge_pages),
        ("memory and disk", "shared memory", _shared),
    ]


def _free_memory() -> Check:
    host, limit = psutil.virtual_memory(), machine.memory_limit()
    return memory.memory(limit, memory.available(limit, int(host.available)), int(host.total))


def _swap() -> Check:
    found = psutil.swap_memory()
    return memory.swap(int(found.total), int(found.used))


def _shared() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return memory.shared_memory(None)
    found = shutil.disk_usage(folder)
    return memory.shared_memory(found.total, found.free)


def _disk(quick: bool) -> list[Row]:
    return [
        ("memory and disk", "temporary files", lambda: disk.room(
            "temporary files", disk.room_in(Path(tempfile.gettempdir())),
            "What trials write goes there, a cache and the checkpoints of two runs among it.",
            "export TMPDIR=/a/folder/with/room")),
        ("memory and disk", "this folder", lambda: disk.room(
            "this folder", disk.room_in(Path.cwd()), "Runs and their checkpoints are recorded where a training is "
            "started.", "cd /a/folder/with/room", needed=False)),
        ("memory and disk", "cache folder", lambda: disk.room(
            "cache folder", disk.room_in(cache_file("", 0, "", 0).parent), "Peaks of this machine are kept there; "
            "without it they are measured each time.", "export XDG_CACHE_HOME=/a/folder/with/room", needed=False)),
        ("memory and disk", "disk speed", lambda: _speed(quick)),
        ("memory and disk", "open files", lambda: disk.open_files(*_limit("RLIMIT_NOFILE"))),
    ]  # fmt: skip


def _speed(quick: bool) -> Check:
    folder = Path(tempfile.gettempdir())
    kind = disk.kind_of(folder)
    if quick:
        return disk.speed(None, str(folder), kind, "--quick was given")
    if disk.room_in(folder).free < 8 * disk.SAMPLE:
        return disk.speed(None, str(folder), kind, f"there is little room in {folder}")
    try:
        return disk.speed(disk.time_disk(folder), str(folder), kind)
    except OSError as error:
        return disk.speed(None, str(folder), kind, f"{folder} cannot be written: {error.strerror}")


def _environment() -> list[Row]:
    return [
        ("environment", "Python", environment.python_here),
        ("environment", "environment", _active),
        ("environment", "module path", lambda: environment.leaks(os.environ, environment.user_site(),
                                                                 environment.own_environment())),
    ]  # fmt: skip


def _active() -> Check:
    command = shutil.which("python")
    other = environment.prefix_of(command, sys.executable, sys.prefix) if command else None
    return environment.active(os.environ, sys.prefix, command, other)
