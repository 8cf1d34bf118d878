"""The Python environment: the interpreter, what leaks into it, and what upshift's own trials need."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import site
import struct
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from upshift.hardware.health.check import Check, Run, one_line, run

#: Older ones are not supported.
LEAST_PYTHON = (3, 11)
#: Seconds for another interpreter to say where it lives.
SECONDS = 10.0


def python(
    version: tuple[int, int], implementation: str, bits: int, free_threaded: bool = False, prefix: str = ""
) -> Check:
    """The interpreter this runs on."""
    kind = " without the GIL" if free_threaded else ""
    found = f"{implementation} {'.'.join(map(str, version))}{kind}, {bits} bit" + (f", in {prefix}" if prefix else "")
    needs = f"torch and upshift are built for CPython {'.'.join(map(str, LEAST_PYTHON))} and later, 64 bit."
    if version < LEAST_PYTHON or bits < 64 or implementation != "CPython":
        return Check("Python", "wrong", found, needs, "conda create -n training python=3.12")
    if free_threaded:
        return Check("Python", "note", found, "Many packages are not ready for it, upshift is not tested on it.",
                     "conda create -n training python=3.12")  # fmt: skip
    return Check("Python", "ok", found, needs)


def python_here() -> Check:
    """The interpreter this runs on."""
    return python(sys.version_info[:2], platform.python_implementation(), struct.calcsize("P") * 8,
                  bool(sysconfig.get_config_var("Py_GIL_DISABLED")), sys.prefix)  # fmt: skip


def active(env: Mapping[str, str], prefix: str, command: str | None, other: str | None) -> Check:
    """Whether the environment that is activated, the `python` a shell starts and this interpreter are the same.

    Args:
        prefix: sys.prefix of this interpreter; command: the `python` on PATH, None where there is none;
        other: its sys.prefix, None where it did not say.
    """
    name = "environment"
    why = "What `python train.py` and `upshift run train.py` import should be the same packages."
    activate = f". {prefix}/bin/activate" if Path(prefix, "bin/activate").exists() else f"conda activate {prefix}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        wanted = env.get(variable, "")
        if wanted and _same(wanted, prefix):
            break
        # A venv made inside an activated conda environment is used on purpose.
        if wanted and not (variable == "CONDA_PREFIX" and env.get("VIRTUAL_ENV")):
            return Check(name, "note", f"{variable} is {wanted}, but this runs in {prefix}", f"{why} The environment "
                         "that is activated has no upshift, or another one comes first on PATH.",
                         f"{wanted}/bin/python -m pip install upshift")  # fmt: skip
    if command is None:
        return Check(name, "ok", f"{prefix}; there is no `python` on PATH", why)
    if other is None:
        return Check(name, "unknown", f"{prefix}; {command} does not say where it lives", why)
    if not _same(other, prefix):
        return Check(name, "note", f"`python` is {command} (in {other}), this runs in {prefix}", why, activate)
    return Check(name, "ok", prefix, why)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def prefix_of(command: str, own: str, prefix: str, execute: Run = run) -> str | None:
    """sys.prefix of another interpreter; None where it does not say. That beside our own is not asked."""
    # Not resolved: the python of a venv is a link to that of the system.
    if Path(command).parent == Path(own).parent:
        return prefix
    ran = execute([command, "-c", "import sys; print(sys.prefix)"], SECONDS)
    lines = ran.out.strip().splitlines()
    return lines[-1] if ran.code == 0 and lines else None


def leaks(env: Mapping[str, str], user_site: str | None, own_environment: bool) -> Check:
    """Packages that come from outside the environment.

    Args:
        user_site: the user's site-packages if they are on the path and not empty, else None;
        own_environment: this is a venv or a conda environment, which is meant to stand alone.
    """
    why = "Packages from elsewhere hide those of the environment: another numpy or torch than was installed."
    for variable in ("PYTHONHOME", "PYTHONPATH"):
        if env.get(variable):
            return Check("module path", "note", f"{variable}={one_line(env[variable])}", why, f"unset {variable}")
    if user_site and own_environment:
        return Check("module path", "note", f"{user_site} is on the path of this environment", why,
                     "export PYTHONNOUSERSITE=1")  # fmt: skip
    return Check("module path", "ok", "nothing comes from outside the environment", why)


def user_site() -> str | None:
    """The user's own site-packages, if this interpreter looks there and something is in it."""
    folder = site.getusersitepackages() if site.ENABLE_USER_SITE else ""
    if not folder or folder not in sys.path:
        return None
    try:
        return folder if any(Path(folder).iterdir()) else None
    except OSError:
        return None


def own_environment() -> bool:
    """Whether this is a venv or a conda environment."""
    return sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()


def distributions(name: str = "torch", path: Sequence[str] | None = None) -> tuple[tuple[str, str], ...]:
    """Version and folder of each installation of a package on the path, the one that is imported first."""
    found: dict[str, str] = {}
    for item in importlib.metadata.distributions(name=name, path=list(sys.path if path is None else path)):
        folder = os.path.realpath(str(item.locate_file("")))
        # Two records in one folder are two installations on top of each other.
        found.setdefault(f"{folder}\0{item.version}", item.version)
    return tuple((version, key.partition("\0")[0]) for key, version in found.items())


def twice(found: Sequence[tuple[str, str]], imported: str = "") -> Check | None:
    """Whether torch is installed once.

    Args:
        found: see `distributions`; imported: the version that `import torch` gives, empty where it is not known.
    """
    why = "Which one is imported depends on the path; packages built against the other fail."
    if not found:
        return None
    if len(found) > 1:
        each = "; ".join(f"{version} in {folder}" for version, folder in found)
        return Check("torch installations", "wrong", f"{len(found)}: {each}", why,
                     "pip uninstall -y torch    (until none is left), then pip install torch")  # fmt: skip
    version, folder = found[0]
    if imported and imported.partition("+")[0] != version.partition("+")[0]:
        return Check("torch installations", "wrong", f"pip knows {version}, imported is {imported}", why,
                     "pip install --force-reinstall torch")  # fmt: skip
    return Check("torch installations", "ok", f"one, in {folder}", why)


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
