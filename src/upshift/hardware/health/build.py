"""torch: which build, and whether it fits the processor and the accelerator of this machine."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from upshift.hardware.health.check import Check, Run, one_line, run

#: Versions of torch below this are not supported.
LEAST_TORCH = (2, 10)
#: Seconds after which an import is given up; from a cold network disk torch alone takes half a minute.
SECONDS = 60.0
WHEELS = "https://download.pytorch.org/whl"


class TorchFacts(msgspec.Struct, frozen=True):
    """What torch says of itself, in a process of its own. None: it did not say.

    `cuda`, `hip`: the toolkit it was built with. `archs`: what its kernels were compiled for (`sm_90`, `compute_90`).
    `started`: whether it could start a device, else `problem`. `devices`: name, major and minor compute capability.
    `driver_cuda`: the newest CUDA the driver understands, 1000 * major + 10 * minor. `failure`: why there is no torch.
    """

    version: str = ""
    file: str = ""
    cuda: str | None = None
    hip: str | None = None
    mkl: bool | None = None
    onednn: bool | None = None
    openmp: bool | None = None
    capability: str | None = None
    amx: bool | None = None
    threads: int | None = None
    mps: bool | None = None
    driver_cuda: int | None = None
    cudnn: int | None = None
    nccl: str | None = None
    archs: tuple[str, ...] = ()
    started: bool | None = None
    problem: str = ""
    devices: tuple[tuple[str, int, int], ...] = ()
    triton: str | None = None
    failure: str = ""


def ask_torch(execute: Run = run) -> TorchFacts:
    """What torch says of itself."""
    return msgspec.convert(asked("torch", execute), TorchFacts)


def asked(name: str, execute: Run) -> dict[str, object]:
    """What `_child.py` finds out about a package: field -> value."""
    script = str(Path(__file__).with_name("_child.py"))
    # -P: a file of this folder must not stand in for a package.
    ran = execute((sys.executable, "-P", script, name), SECONDS)
    found: dict[str, object] = {}
    for line in ran.out.splitlines():
        try:
            part = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(part, dict):
            found.update(part)
    if not found.get("version") and not found.get("failure"):
        last = ran.err.strip().splitlines()[-1:] or ["without a word"]
        ended = ran.problem or f"the process that imports it ended with code {ran.code}: {last[0]}"
        found["failure"] = one_line(ended)
    elif ran.problem and "started" not in found and (found.get("cuda") or found.get("hip")):
        found |= {"started": False, "problem": f"it did not start its devices within {SECONDS:g} s"}
    return found


def release(version: str) -> tuple[int, int]:
    """Major and minor version: `2.13.0+cpu` -> (2, 13); what cannot be read counts as 0."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def torch_build(facts: TorchFacts) -> Check:
    """Which torch is installed, and what it was built with."""
    why = "Training runs on it; upshift leaves it as it is."
    mend = "pip install 'upshift[torch]'"
    if facts.failure:
        return Check("torch", "wrong", f"cannot be imported: {one_line(facts.failure)}", why, mend)
    built = [name for name, there in (("MKL", facts.mkl), ("oneDNN", facts.onednn)) if there]
    found = f"{facts.version}, with {' and '.join(built) or 'neither MKL nor oneDNN'}"
    if release(facts.version) < LEAST_TORCH:
        return Check("torch", "wrong", found, f"upshift needs {'.'.join(map(str, LEAST_TORCH))} or later.", mend)
    if not built:
        return Check("torch", "note", found, "Without them matrix products on the CPU are slow.", mend)
    return Check("torch", "ok", found, why)


def kernels_for(major: int, minor: int, archs: Sequence[str]) -> Literal["binary", "ptx", "none"]:
    """Whether code compiled for `archs` runs on a GPU of compute capability `major.minor`.

    Machine code (`sm_86`) runs on the same major and a minor not below its own; with `a` on that very chip only, with
    `f` within its family. PTX (`compute_86`) is compiled by the driver for every later one, with `a` for none.
    Source: CUDA C++ Programming Guide, section "Application Compatibility".
    """
    ptx = False
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not found:
            continue
        own = (int(found[2]), int(found[3]))
        if found[4] == "a":
            fits = own == (major, minor)
        elif found[1] == "sm" or found[4] == "f":
            fits = own[0] == major and own[1] <= minor
        else:
            fits = own <= (major, minor)
        if fits and found[1] == "sm":
            return "binary"
        ptx = ptx or fits
    return "ptx" if ptx else "none"


def wheels(cuda: str) -> str:
    """The pip command for a CUDA build that the driver can run; `cuda`: the newest CUDA it understands, or empty.

    A build for CUDA 12.x runs with every driver for 12.y (minor version compatibility in the CUDA documentation).
    """
    index = "cu130" if not cuda or release(cuda) >= (13, 0) else "cu126"
    return f"pip install --force-reinstall torch --index-url {WHEELS}/{index}"


def driver_text(number: int | None) -> str:
    """`12040` -> `12.4`; empty where it is not known."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def torch_device(facts: TorchFacts, nvidia: bool, amd: bool, driver: str, visible: str | None) -> Check | None:
    """Whether this build of torch can use the accelerator of this machine.

    Args:
        nvidia, amd: whether such a GPU was seen on this machine; driver: the newest CUDA its driver understands, or
            empty; visible: the value of CUDA_VISIBLE_DEVICES.
    """
    name, why = "torch and device", "A build for another device trains on the CPU, or not at all."
    if facts.failure:
        return None
    built = (
        f"built for CUDA {facts.cuda}" if facts.cuda else f"built for ROCm {facts.hip}" if facts.hip else "a CPU build"
    )
    driver = driver or driver_text(facts.driver_cuda)
    if nvidia and not facts.cuda:
        return Check(name, "wrong", f"{built} on a machine with an NVIDIA GPU",
                     "The GPU stands still: this build cannot use it.", wheels(driver))  # fmt: skip
    if amd and not nvidia and not facts.hip:
        return Check(name, "note", f"{built} on a machine with an AMD GPU", "ROCm builds can use it, if it is a "
                     "supported one.", f"pip install --force-reinstall torch --index-url {WHEELS}/rocm6.4")  # fmt: skip
    if facts.mps:
        return Check(name, "ok", f"{built}; the Apple GPU can be used (MPS)", why)
    if not nvidia and not facts.started:
        return Check(name, "ok", f"{built}; no GPU was seen, so it trains on the CPU", why)
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return Check(name, "note", f"{built}; CUDA_VISIBLE_DEVICES={visible} hides all GPUs",
                     "Training runs on the CPU.", "unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    # Where a device was started all the same, a newer libcuda stands in (the compatibility package of CUDA).
    if not facts.started and facts.cuda and driver and release(driver)[0] < release(facts.cuda)[0]:
        return Check(name, "wrong", f"{built}, but the driver understands CUDA {driver} at most",
                     "The driver must be as new as the CUDA that torch was built with.",
                     wheels(driver) if release(driver) >= (12, 0) else "ubuntu-drivers install    (a newer driver)",
                     )  # fmt: skip
    if facts.started is False:
        return Check(name, "wrong", f"{built}, but no GPU could be started: "
                     f"{one_line(facts.problem) or 'none is seen'}",
                     "Training falls back to the CPU, or stops.",
                     "nvidia-smi    (shows what holds it; then: reboot)")  # fmt: skip
    if facts.started is None:
        return Check(name, "unknown", f"{built}; its devices were not asked", why)
    return _kernels(facts, name, built, why)


def _kernels(facts: TorchFacts, name: str, built: str, why: str) -> Check:
    libraries = [built]
    if facts.cudnn:
        libraries.append(f"cuDNN {_cudnn(facts.cudnn)}")
    if facts.nccl:
        libraries.append(f"NCCL {facts.nccl}")
    text = ", ".join(libraries)
    for device, major, minor in facts.devices if facts.cuda and facts.archs else ():
        fit = kernels_for(major, minor, facts.archs)
        found = f"{text}; {device} has compute capability {major}.{minor}, the build has {' '.join(facts.archs)}"
        if fit == "none":
            older = all((major, minor) < _capability(arch) for arch in facts.archs)
            return Check(name, "wrong", found, "There is no kernel for this GPU: the first operation fails.",
                         wheels("12.6" if older else "13.0"))  # fmt: skip
        if fit == "ptx":
            return Check(name, "note", found, "The driver compiles each kernel for this GPU when it is first used: "
                         "the first start takes minutes, and the kernels are older ones.",
                         "pip install --upgrade torch")  # fmt: skip
    names = ", ".join(device for device, _, _ in facts.devices) or "a GPU"
    return Check(name, "ok", f"{text}; it can use {names}", why)


def _capability(arch: str) -> tuple[int, int]:
    digits = re.sub(r"\D", "", arch)
    return (int(digits[:-1]), int(digits[-1])) if len(digits) > 1 else (0, 0)


def _cudnn(number: int) -> str:
    """`91002` -> `9.10.2`, `8902` -> `8.9.2`: the number has one digit less before version 9."""
    major, rest = divmod(number, 10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def instructions(facts: TorchFacts, features: frozenset[str], env: Mapping[str, str]) -> Check | None:
    """The vector instructions torch uses, against those the processor has.

    Args:
        features: flags of the processor (`avx2`, `amx_tile`); env: the environment.
    """
    name = "vector instructions"
    if facts.failure or facts.capability is None:
        return None
    best = next((text for text, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in features), "")
    amx = "amx_tile" in features
    has = " and ".join([*([best] if best else []), *(["AMX"] if amx else [])])
    found = f"torch uses {facts.capability}" + (f"; the processor has {has}" if has else "")
    if amx and facts.amx:
        found += "; AMX may be used"
    why = "Wider vectors do more per cycle, and AMX multiplies bfloat16 matrices in hardware."
    for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        least = "avx512" if not amx or variable.startswith("ATEN") else "amx"
        if env.get(variable) and not re.search(f"all|default|avx10|{least}", env[variable].lower()):
            return Check(name, "note", f"{found}; {variable}={env[variable]}", f"{variable} holds torch back.",
                         f"unset {variable}")  # fmt: skip
    if amx and facts.amx is False:
        return Check(name, "note", f"{found}; the system does not let programs use AMX", why,
                     "uname -r    (Linux 5.16 or later is needed)")  # fmt: skip
    # AVX-512 without these parts is not used by torch, which is no fault.
    whole = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features
    wanted = ("AVX512",) if whole else ("AVX2", "AVX512") if best == "AVX2" else ()
    if wanted and facts.capability not in wanted:
        return Check(name, "note", found, why, "pip install --force-reinstall torch    (a build for this processor)")
    return Check(name, "ok", found, why)
