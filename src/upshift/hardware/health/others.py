"""Accelerators of other makers, seen without starting one: AMD's GPUs and Google's TPUs.

AMD: the bus, `/dev/kfd` and the topology the kernel shows of it (docs of the amdgpu driver, `amdkfd`), the name by
rocm-smi where it is installed. TPU: the bus (device numbers as JAX's `hardware_utils` knows them), `/dev/accel*` (v4
and before), `/dev/vfio/*` (later ones), and the variables and packages of PyTorch/XLA. No check here has been run on
such a machine: recorded trees stand for them in the tests.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import msgspec

from upshift.hardware.health.check import Check, Run, run
from upshift.hardware.health.gpus import AMD, SECONDS
from upshift.hardware.health.system import container, text_of

GOOGLE = "0x1ae0"
#: Device numbers on the bus -> generation.
TPUS = {
    "0x0027": "v2 or v3", "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x",
}  # fmt: skip
#: Variables that say this machine is, or should be, one with a TPU.
_HINTS = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_ID")
#: Largest file of the kernel's topology that is read.
_MOST = 1 << 16


class Amd(msgspec.Struct, frozen=True):
    """What was seen of AMD's GPUs. `targets`: what the kernel says they compute with (`gfx942`).

    `slots`: on the bus; `driver`: the kernel's amdgpu is loaded for one; `kfd`: `/dev/kfd` is there; `open`: this user
    may open it. `rocm`: the release installed on the system, or empty; builds of torch bring their own.
    """

    slots: int = 0
    driver: bool = False
    kfd: bool = False
    open: bool = False
    targets: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    rocm: str = ""
    inside: str = ""


class Tpu(msgspec.Struct, frozen=True):
    """What was seen of TPUs. `chips`: generation of each on the bus; `files`: device files that belong to TPUs.

    `bus`: whether the bus can be read; `vfio`: devices are handed to programs, TPUs or others.
    """

    chips: tuple[str, ...] = ()
    files: int = 0
    bus: bool = True
    vfio: bool = False
    kind: str = ""
    wanted: str = ""
    hinted: bool = False
    xla: str | None = None
    libtpu: str | None = None


def _can_open(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def look_amd(
    root: Path = Path("/"), execute: Run = run, env: Mapping[str, str] | None = None,
    can_open: Callable[[Path], bool] = _can_open,
) -> Amd:  # fmt: skip
    """What can be seen of AMD's GPUs on this machine. Accelerators without a display (class 12) count."""
    found = [
        folder for folder in (root / "sys/bus/pci/devices").glob("*")
        if text_of(folder / "vendor") == AMD and text_of(folder / "class").startswith(("0x03", "0x12"))
    ]  # fmt: skip
    targets = tuple(target for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*"))
                    if (target := _target(node)))  # fmt: skip
    kfd = root / "dev/kfd"
    names = tuple(name for folder in sorted(found) if (name := text_of(folder / "product_name")))
    if found and not names:
        names = _names(execute)
    return Amd(
        slots=len(found),
        driver=any((folder / "driver").resolve().name == "amdgpu" for folder in found),
        kfd=kfd.exists(),
        open=kfd.exists() and can_open(kfd),
        targets=targets,
        names=names,
        rocm=text_of(root / "opt/rocm/.info/version").partition("-")[0],
        inside=container(root, env),
    )


def _target(node: Path) -> str:
    """`90402` -> `gfx942`, `90010` -> `gfx90a`; empty for a processor (it has the number 0) and what cannot be read."""
    try:
        text = (node / "properties").read_bytes()[:_MOST].decode("ascii", "replace")
    except OSError:
        return ""
    found = re.search(r"^gfx_target_version (\d{5,6})$", text, re.MULTILINE)
    if not found:
        return ""
    major, rest = divmod(int(found[1]), 10000)
    return f"gfx{major}{rest // 100}{rest % 100:x}"


def _names(execute: Run) -> tuple[str, ...]:
    """Names as rocm-smi says them; its keys change their case from version to version."""
    ran = execute(("rocm-smi", "--showproductname", "--json"), SECONDS)
    try:
        cards = json.loads(ran.out) if ran.code == 0 else {}
    except (ValueError, RecursionError):
        cards = {}
    found = []
    for card in cards.values() if isinstance(cards, dict) else ():
        told = {str(key).lower(): value for key, value in card.items()} if isinstance(card, dict) else {}
        name = told.get("card series")
        if isinstance(name, str) and name and name != "N/A" and not name.startswith("0x"):
            found.append(name)
    return tuple(found)


def amd(seen: Amd) -> Check | None:
    """Whether programs can reach the AMD GPUs; which build of torch they need is the check "torch and device"."""
    if not (seen.slots or seen.kfd):
        return None
    name, why = "AMD GPU", "ROCm builds of torch reach it through /dev/kfd."
    what = ", ".join(dict.fromkeys(seen.names)) or "an AMD GPU"
    many = f"{seen.slots} x " if seen.slots > 1 else ""
    here = f"{many}{what}" + (f" ({', '.join(dict.fromkeys(seen.targets))})" if seen.targets else "")
    if not seen.kfd and seen.inside:
        return Check(name, "note", f"{here}, but no /dev/kfd in this container ({seen.inside})", why,
                     "docker run --device /dev/kfd --device /dev/dri --group-add video ...")  # fmt: skip
    if not seen.driver and not seen.kfd:
        return Check(name, "note", f"{here}, but the kernel's driver amdgpu has none of them", why, "modprobe amdgpu")
    if not seen.kfd:
        return Check(name, "note", f"{here}; the kernel offers no /dev/kfd, so it cannot compute", why,
                     "dmesg | grep -i kfd    (says why)")  # fmt: skip
    if not seen.open:
        return Check(name, "note", f"{here}; this user may not open /dev/kfd", why,
                     "usermod -aG render,video $USER    (and log in again)")  # fmt: skip
    if not seen.targets:
        return Check(name, "unknown", f"{here}; what it computes with is not shown here", why)
    rocm = f"; ROCm {seen.rocm}" if seen.rocm else ""
    return Check(name, "ok", f"{here}{rocm}; torch for ROCm can use it if it supports {seen.targets[0]}", why)


# -- TPUs --------------------------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """The version of a package, found without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def look_tpu(
    root: Path = Path("/"), env: Mapping[str, str] | None = None, version: Callable[[str], str | None] = installed
) -> Tpu:
    """What can be seen of TPUs on this machine."""
    told = os.environ if env is None else env
    bus = root / "sys/bus/pci/devices"
    chips = tuple(
        TPUS[number] for folder in sorted(bus.glob("*"))
        if text_of(folder / "vendor") == GOOGLE and (number := text_of(folder / "device")) in TPUS
    )  # fmt: skip
    return Tpu(
        chips=chips,
        # The kernel's own class of accelerators lies in a folder /dev/accel: these are others.
        files=len(list((root / "dev").glob("accel[0-9]*"))),
        bus=any(bus.glob("*")),
        vfio=any((root / "dev/vfio").glob("[0-9]*")),
        kind=told.get("TPU_ACCELERATOR_TYPE", "")[:60],
        wanted=told.get("PJRT_DEVICE", "")[:60],
        hinted=any(told.get(name) for name in _HINTS) or told.get("PJRT_DEVICE", "").upper() == "TPU",
        xla=version("torch_xla"),
        libtpu=version("libtpu"),
    )


def tpu(seen: Tpu, torch: str = "") -> Check | None:
    """Whether PyTorch/XLA can use the TPU that is here.

    Args:
        torch: version of the torch that is installed, or empty.
    """
    name, why = "TPU", "torch reaches it through PyTorch/XLA of its own release; upshift has no technique for it."
    if not (seen.chips or seen.files):
        if not seen.hinted:
            return None
        found = f"variables speak of a TPU{f' ({seen.kind})' if seen.kind else ''}, but none is seen"
        if seen.vfio and not seen.bus:
            return Check(name, "unknown", f"{found}: the bus cannot be read, and /dev/vfio may be one", why)
        return Check(name, "note", found, why, "unset PJRT_DEVICE TPU_ACCELERATOR_TYPE TPU_NAME TPU_WORKER_ID")
    count = len(seen.chips) or seen.files
    kinds = ", ".join(dict.fromkeys(f"TPU {chip}" for chip in seen.chips)) or "TPU of unknown generation"
    here = f"{count} x {kinds}" + (f", {seen.kind}" if seen.kind else "")
    wanted = ".".join(torch.split(".")[:2])
    install = f"pip install 'torch_xla[tpu]{f'=={wanted}.*' if wanted else ''}'"
    if seen.xla is None:
        return Check(name, "note", f"{here}; PyTorch/XLA is not installed", why, install)
    here = f"{here}; torch_xla {seen.xla}"
    if wanted and ".".join(seen.xla.split(".")[:2]) != wanted:
        return Check(name, "note", f"{here} beside torch {torch}", why, install)
    if seen.libtpu is None:
        return Check(name, "note", f"{here}, without libtpu", why, install)
    here = f"{here}, libtpu {seen.libtpu}"
    if seen.wanted and seen.wanted.upper() != "TPU":
        return Check(name, "note", f"{here}; PJRT_DEVICE={seen.wanted} turns away from it", why,
                     "export PJRT_DEVICE=TPU")  # fmt: skip
    return Check(name, "ok", here, why)
