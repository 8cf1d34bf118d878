"""The machine itself: system, processor, cores against quota and affinity, OpenMP settings, NUMA nodes."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from upshift.hardware import machine
from upshift.hardware.health.check import Check

#: Wheels of torch for Linux are built for this version of glibc (`manylinux_2_28`).
LEAST_GLIBC = (2, 28)


def text_of(path: Path) -> str:
    """The text of a small file, or the empty string where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def release_facts(root: Path = Path("/")) -> dict[str, str]:
    """The fields of /etc/os-release: ID, PRETTY_NAME and others."""
    found = {}
    for line in (text_of(root / "etc/os-release") or text_of(root / "usr/lib/os-release")).splitlines():
        key, sign, value = line.partition("=")
        if sign:
            found[key.strip()] = value.strip().strip("\"'")
    return found


def container(root: Path = Path("/"), env: Mapping[str, str] | None = None) -> str:
    """The kind of container this process runs in, or the empty string."""
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (os.environ if env is None else env).get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    named = text_of(root / "run/systemd/container")
    if named:
        return named
    groups = text_of(root / "proc/1/cgroup")
    return next((kind for kind in ("kubepods", "docker", "lxc") if kind in groups), "")


def system(
    root: Path = Path("/"),
    name: str | None = None,
    kernel: str | None = None,
    libc: tuple[str, str] | None = None,
    env: Mapping[str, str] | None = None,
) -> Check:
    """The operating system, its C library, and whether this is a container.

    Args:
        name, kernel, libc: as `platform.system`, `release` and `libc_ver` say them; None asks.
    """
    name, kernel = name or platform.system(), kernel or platform.release()
    kind, version = libc or platform.libc_ver()
    pretty = release_facts(root).get("PRETTY_NAME", "")
    inside = container(root, env)
    words = [f"{name} {kernel} {platform.machine()}", pretty, f"{kind} {version}".strip(),
             f"inside a container ({inside})" if inside else "",
             "WSL" if "microsoft" in kernel.lower() else ""]  # fmt: skip
    found = ", ".join(word for word in words if word)
    if name != "Linux":
        return Check("system", "note", found, "Isolation of trials, control groups and most checks here are those of "
                     "Linux; elsewhere Python's own writes are redirected, and less is measured.")  # fmt: skip
    if any(root.glob("lib/ld-musl-*")):
        return Check("system", "note", found, "There are no wheels of torch for musl, the C library of this system.",
                     "docker run ... python:3.12-slim    (a system with glibc)")  # fmt: skip
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if kind == "glibc" and len(parts) == 2 and parts < LEAST_GLIBC:
        return Check("system", "note", found, "Wheels of torch need glibc 2.28 or later; pip takes old ones here.",
                     "docker run ... python:3.12-slim    (a later system)")  # fmt: skip
    return Check("system", "ok", found, "Wheels of torch are built for glibc 2.28 and later.")


def processor(root: Path = Path("/")) -> Check:
    """The processor, and whether it multiplies bfloat16 in hardware."""
    features = machine.cpu_features(root)
    kinds = [name for name in ("amx_bf16", "avx512_bf16", "svebf16", "bf16") if name in features]
    native = f"bf16 in hardware ({', '.join(kinds)})" if kinds else "no bf16 in hardware"
    if not features:
        native = "what it can do is not known"
    found = f"{machine.cpu_model(root)}; {native}"
    x86 = "sse2" in features or "lm" in features
    if x86 and "avx2" not in features:
        return Check("processor", "note", f"{found}; no AVX2", "Without AVX2 torch computes 4 numbers at a time "
                     "instead of 8. A virtual machine can hide it: it is then a setting of the host.",
                     "qemu-system-x86_64 -cpu host    (on the host)")  # fmt: skip
    why = "bf16 is the largest gain there is on a CPU." if kinds else "Here bf16 is emulated, and seldom faster."
    return Check("processor", "ok", found, why)


def affinity_here() -> frozenset[int]:
    """The logical cores the scheduler allows this process."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return frozenset(range(os.cpu_count() or 1))


def cores(root: Path = Path("/"), affinity: int | None = None) -> Check:
    """Cores this process may use, against those of the machine.

    Args:
        affinity: number of cores the scheduler allows; None asks it.
    """
    allowed = affinity if affinity is not None else len(affinity_here())
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


def openmp(env: Mapping[str, str], usable: int, threads: int | None = None) -> Check:
    """The OpenMP settings of the environment against `usable` cores; `threads`: how many torch starts."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY",
             "KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_DUPLICATE_LIB_OK")  # fmt: skip
    given = {name: env[name] for name in names if env.get(name)}
    found = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing is set"
    if threads is not None:
        found += f"; torch computes with {threads} thread{'s' if threads != 1 else ''}"
    for name in names[:2]:
        if given.get(name, "").isdecimal() and int(given[name]) > usable:
            return Check("OpenMP", "wrong", found, f"{given[name]} threads share {usable} cores.", f"unset {name}")
    for name in names[:2]:
        if given.get(name, "").isdecimal() and int(given[name]) < usable:
            return Check(
                "OpenMP", "note", found, f"Only {given[name]} of {usable} cores are used by one training process.",
                f"unset {name}",
            )  # fmt: skip
    bound = next((name for name in names[3:6] if name in given), "")
    if bound and given[bound].lower() not in ("false", "none", "disabled"):
        why = "Loader workers inherit the cores threads are bound to."
        return Check("OpenMP", "note", found, why, f"unset {bound}")
    if given.get(names[7], "").lower() in ("true", "1", "yes"):
        return Check("OpenMP", "note", found, "Two copies of OpenMP in one process may give wrong results; this "
                     "setting only hides them. Take torch and numpy from the same source (pip or conda).",
                     f"unset {names[7]}")  # fmt: skip
    return Check("OpenMP", "ok", found, "These variables decide how many threads compute, and where.")


def numbers(text: str) -> frozenset[int]:
    """A list of the kernel: `0-3,8` -> {0, 1, 2, 3, 8}. What is no number is passed over."""
    found: set[int] = set()
    for part in text.replace("\n", ",").split(","):
        low, _, high = part.strip().partition("-")
        if low.isdecimal() and (high or low).isdecimal():
            # No machine has more cores; a damaged file must not fill the memory.
            found.update(range(int(low), min(int(high or low), int(low) + 65536) + 1))
    return frozenset(found)


def numa(root: Path = Path("/"), cpus: Collection[int] | None = None, gpus: Sequence[int] = ()) -> Check:
    """Whether the cores of this process lie on one NUMA node, and on that of its GPUs.

    Args:
        cpus: the cores this process may use; None asks. gpus: the node of each GPU, where it is known.
    """
    nodes = {int(path.parent.name[4:]): numbers(text_of(path))
             for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*/cpulist"))
             if path.parent.name[4:].isdecimal()}  # fmt: skip
    why = "Memory of another node is slower to reach."
    if not nodes:
        return Check("NUMA nodes", "unknown", "the system does not say", why)
    own = affinity_here() if cpus is None else frozenset(cpus)
    used = sorted(node for node, there in nodes.items() if there & own)
    if len(nodes) == 1:
        return Check("NUMA nodes", "ok", "one", why)
    found = f"{len(nodes)}; this process may use the cores of {', '.join(f'node {node}' for node in used) or 'none'}"
    far = sorted({node for node in gpus if node >= 0 and node not in used})
    if used and far:
        return Check("NUMA nodes", "note", f"{found}, a GPU is at node {far[0]}", "Batches cross to the GPU's node "
                     "before they are copied to it.",
                     f"numactl --cpunodebind={far[0]} --membind={far[0]} upshift run train.py")  # fmt: skip
    if len(used) > 1:
        node = next((item for item in gpus if item in used), used[0])
        return Check("NUMA nodes", "note", found, f"{why} Threads and memory that move between nodes make a step "
                     "slower and its time less even; one process per node is the rule.",
                     f"numactl --cpunodebind={node} --membind={node} upshift run train.py")  # fmt: skip
    return Check("NUMA nodes", "ok", found, why)
