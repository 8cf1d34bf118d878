"""Can torch.compile build? A tiny kernel is compiled with OpenMP, as inductor does it, loaded and called."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from upshift.hardware.health.check import Check, Run, one_line, run
from upshift.hardware.machine import compiler_name, has_compiler
from upshift.units import seconds as in_words

#: Seconds for the compiler, and for loading what it made.
COMPILE_SECONDS, LOAD_SECONDS = 30.0, 10.0

#: What inductor needs: C++, OpenMP and the headers of Python.
SOURCE = """\
#include <Python.h>
#include <omp.h>
#include <cmath>
extern "C" double upshift_sum(int n) {
    double total = 0.0;
    #pragma omp parallel for reduction(+ : total)
    for (int i = 0; i < n; ++i) total += std::sqrt(static_cast<double>(i) * i);
    return total;
}
"""
#: 0 + 1 + ... + 9 is what it returns.
CALL = """\
import ctypes, sys
call = ctypes.CDLL(sys.argv[1]).upshift_sum
call.restype = ctypes.c_double
sys.exit(call(10) != 45.0)
"""

WHY = "torch.compile builds its kernels with a C++ compiler; without one it is not tried on the CPU."


def present(env: Mapping[str, str]) -> Check:
    """Whether there is a compiler at all."""
    name = compiler_name(env)
    return Check("compiler", "ok", f"{name} was found; not tried", WHY) if has_compiler(env) else _missing(name, env)


def _missing(name: str, env: Mapping[str, str]) -> Check:
    if "CXX" in env:
        whole = " (torch takes all of it for the name of one program)" if len(name.split()) != 1 else ""
        return Check("compiler", "note", f"CXX={name} cannot be started{whole}", WHY, "unset CXX")
    return Check("compiler", "note", f"{name} was not found", WHY, "apt-get install g++")


def builds(env: Mapping[str, str], folder: Path | None = None, execute: Run = run) -> Check:
    """Whether a kernel can be compiled, loaded and called.

    Args:
        folder: where kernels go; None: the folder for temporary files.
    """
    name = compiler_name(env)
    if not has_compiler(env):
        return _missing(name, env)
    if sys.platform != "linux":
        # OpenMP is asked for in other words elsewhere.
        return present(env)
    with tempfile.TemporaryDirectory(prefix="upshift-compiler-", dir=folder, ignore_cleanup_errors=True) as place:
        source, library = Path(place, "kernel.cpp"), Path(place, "kernel.so")
        source.write_text(SOURCE, encoding="utf-8")
        headers = [f"-I{path}" for path in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")} if path]
        began = time.monotonic()
        built = execute(
            [name, "-std=c++17", "-O1", "-shared", "-fPIC", "-fopenmp", *headers, str(source), "-o", str(library)],
            COMPILE_SECONDS,
        )
        took = time.monotonic() - began
        if built.code != 0:
            return _failed(name, built.problem or _complaint(built.err))
        called = execute([sys.executable, "-P", "-c", CALL, str(library)], LOAD_SECONDS)
        if called.code != 0:
            return _unusable(place, called.problem or _complaint(called.err))
    return Check("compiler", "ok", f"{name} built a kernel with OpenMP in {in_words(took)} (measured), and "
                 "it runs", WHY)  # fmt: skip


def _complaint(text: str) -> str:
    """The line of a compiler's or Python's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "without a word"))


def _failed(name: str, complaint: str) -> Check:
    if "Python.h" in complaint:
        mend = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
    elif "omp" in complaint:
        mend = "apt-get install libomp-dev" if "clang" in name else "apt-get install g++ libgomp1"
    else:
        mend = "apt-get install --reinstall g++ libc6-dev"
    return Check("compiler", "wrong", f"{name} is there but does not build: {complaint}",
                 "torch.compile fails with it.", mend)  # fmt: skip


def _unusable(folder: str, complaint: str) -> Check:
    why = "torch.compile keeps its kernels in the folder for temporary files and loads them from there."
    mend = "export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor TMPDIR=/a/folder/that/may/execute"
    if "not permitted" not in complaint and "failed to map" not in complaint:
        mend = "apt-get install --reinstall g++ libgomp1"
    return Check("compiler", "wrong", f"what it builds cannot be loaded from {os.path.dirname(folder)}: {complaint}",
                 why, mend)  # fmt: skip
