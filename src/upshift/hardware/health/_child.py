"""What torch, or a package built against it, says of itself; run as a script, in a process of its own.

    python -P _child.py torch|PACKAGE

A broken build ends its process or hangs, and must not take the doctor with it. Standard output gets one JSON object a
line; later lines add to earlier ones, so that what was known before a driver hung is not lost. Whatever the packages
print goes to standard error. Imports nothing of upshift.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


def asked(what: Callable[[], Any]) -> Any:
    """What the call gives; None where it fails (functions come and go between versions)."""
    try:
        return what()
    except Exception:
        return None


def say(out: TextIO, **facts: Any) -> None:
    """One line."""
    out.write(json.dumps(facts) + "\n")
    out.flush()


def about_torch(out: TextIO) -> None:
    """The build of torch, then what it sees of accelerators."""
    import torch

    # Some of these are untyped, some private: each may be missing.
    any_torch: Any = torch
    backends: Any = torch.backends
    say(
        out,
        version=str(torch.__version__),
        file=str(torch.__file__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        mkl=asked(backends.mkl.is_available),
        onednn=asked(backends.mkldnn.is_available),
        openmp=asked(backends.openmp.is_available),
        capability=asked(backends.cpu.get_cpu_capability),
        amx=asked(any_torch.cpu._init_amx),
        threads=asked(torch.get_num_threads),
        mps=asked(backends.mps.is_available),
    )
    say(out, driver_cuda=asked(driver_cuda))
    if torch.version.cuda or torch.version.hip:
        about_devices(out, torch)


def driver_cuda() -> int:
    """The newest CUDA the driver understands, as 1000 * major + 10 * minor (cuDriverGetVersion)."""
    import ctypes

    version = ctypes.c_int(0)
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
        raise OSError("cuDriverGetVersion failed")
    return version.value


def about_devices(out: TextIO, torch: Any) -> None:
    """The libraries of a CUDA or ROCm build, and the devices it can start."""
    say(
        out,
        cudnn=asked(torch.backends.cudnn.version),
        nccl=asked(lambda: ".".join(map(str, torch.cuda.nccl.version()))),
        archs=asked(torch.cuda.get_arch_list) or [],
    )
    problem = ""
    try:
        torch.cuda.init()
    except Exception as error:
        problem = " ".join(str(error).split())
    say(out, started=not problem, problem=problem)
    if not problem:
        devices = [
            (torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        ]
        say(out, devices=devices, started=bool(devices))
        say(out, triton=asked(lambda: str(__import__("triton").__version__)) or "")


def about_package(out: TextIO, name: str) -> None:
    """Import a package that is built against torch, and look one of its operators up."""
    import importlib

    package = importlib.import_module(name)
    if name == "torchvision":
        import torch

        torch.ops.torchvision.nms  # noqa: B018  (raises where the compiled part was not loaded)
    say(
        out,
        version=str(package.__version__),
        cuda=asked(lambda: package.version.cuda),
        says_cuda=hasattr(getattr(package, "version", None), "cuda"),
    )


def main(name: str) -> None:
    """Say what there is to say, and end without tearing down what may be broken."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        about_torch(out) if name == "torch" else about_package(out, name)
    except BaseException as error:
        say(out, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
