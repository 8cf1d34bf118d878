"""What can be seen of GPUs without starting one: the PCI bus, device files, the driver, and what nvidia-smi says.

`nvidia-smi -q -x` is NVML, read in a process of its own with a time limit: a GPU that hangs holds its caller for ever.
Its fields come and go with the driver's version, so each one may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import msgspec

from upshift.hardware.health.check import Run, one_line, run
from upshift.hardware.health.system import container, release_facts, text_of

NVIDIA, AMD = "0x10de", "0x1002"
#: Seconds nvidia-smi gets: without persistence mode it has to start the driver first.
SECONDS = 10.0

#: The driver's name of a reason for low clocks -> words, and whether it holds training back while nothing runs.
REASONS = {
    "hw_thermal_slowdown": "too hot (hardware)",
    "sw_thermal_slowdown": "too hot (driver)",
    "hw_power_brake_slowdown": "the power supply asks for less",
    "hw_slowdown": "slowed down by the hardware",
    "applications_clocks_setting": "clocks are pinned",
    "sw_power_cap": "at its power limit",
    "sync_boost": "waits for the slowest GPU of its group",
}


class Slot(msgspec.Struct, frozen=True):
    """One display or 3D device on the PCI bus. `driver`: the kernel's driver that has it, or empty; `node`: NUMA."""

    address: str
    driver: str = ""
    node: int | None = None
    width: int | None = None
    width_most: int | None = None


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as nvidia-smi says it. Bytes; None: it does not say."""

    name: str = "GPU"
    address: str = ""
    memory: int | None = None
    used: int | None = None
    programs: int | None = None
    width: int | None = None
    width_most: int | None = None
    generation: int | None = None
    generation_most: int | None = None
    persistence: bool | None = None
    compute_mode: str = ""
    partitioned: bool = False
    uncorrected: int = 0
    """Memory errors since the last start that could not be corrected."""
    remap_pending: bool = False
    remap_failed: bool = False
    temperature: float | None = None
    held: tuple[str, ...] = ()
    """Keys of `REASONS` that are active now."""
    limit: float | None = None
    """Watts it may draw now; by default; and the range that may be set."""
    limit_default: float | None = None
    limit_least: float | None = None
    limit_most: float | None = None
    clock_most: int | None = None
    """MHz of its highest clock."""


class Smi(msgspec.Struct, frozen=True):
    """What nvidia-smi said. `problem`: why it said nothing; `there`: whether it exists."""

    there: bool = True
    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    topology: str = ""
    problem: str = ""


class Seen(msgspec.Struct, frozen=True):
    """All that was seen of GPUs."""

    nvidia: tuple[Slot, ...] = ()
    amd: bool = False
    devices: bool = False
    """There are device files of the driver (/dev/nvidia0, or /dev/dxg on WSL)."""
    module: str = ""
    """The version of the loaded kernel module; empty: none."""
    smi: Smi = Smi(there=False)
    inside: str = ""
    distribution: str = ""
    infiniband: bool = False

    @property
    def usable(self) -> tuple[Slot, ...]:
        """Slots that are not handed to a virtual machine."""
        return tuple(slot for slot in self.nvidia if slot.driver != "vfio-pci")

    @property
    def any_nvidia(self) -> bool:
        """Whether a GPU of NVIDIA is here for programs of this system, with a working driver or without."""
        return bool(self.usable or self.devices or self.smi.gpus)


def slots(root: Path, vendor: str) -> tuple[Slot, ...]:
    """Display controllers (PCI class 03) of a vendor."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        if text_of(folder / "vendor") != vendor or not text_of(folder / "class").startswith("0x03"):
            continue
        driver = folder / "driver"
        found.append(
            Slot(
                folder.name,
                driver.resolve().name if driver.exists() else "",
                _integer(text_of(folder / "numa_node")),
                _lanes(text_of(folder / "current_link_width")),
                _lanes(text_of(folder / "max_link_width")),
            )
        )
    return tuple(found)


def look(root: Path = Path("/"), execute: Run = run, env: Mapping[str, str] | None = None) -> Seen:
    """All that can be seen of GPUs on this machine."""
    version = text_of(root / "sys/module/nvidia/version")
    if not version:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", text_of(root / "proc/driver/nvidia/version"))
        version = found[1] if found else ""
    # WSL has one device file for the GPUs of all makers; Windows lends it the driver's programs.
    windows = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/nvidia-smi").exists()
    devices = any((root / "dev").glob("nvidia[0-9]*")) or windows
    return Seen(
        nvidia=slots(root, NVIDIA),
        amd=bool(slots(root, AMD)) and (root / "dev/kfd").exists(),
        devices=devices,
        module=version,
        smi=ask(execute),
        inside=container(root, env),
        distribution=release_facts(root).get("ID", ""),
        infiniband=any((root / "sys/class/infiniband").glob("*")),
    )


def ask(execute: Run = run) -> Smi:
    """What nvidia-smi says of driver, GPUs and the links between them."""
    ran = execute(("nvidia-smi", "-q", "-x"), SECONDS)
    if ran.code is None and not ran.out and "cannot be started" in ran.problem:
        return Smi(there=False, problem=ran.problem)
    if ran.code != 0:
        said = (ran.out.strip() or ran.err.strip()).splitlines()
        return Smi(problem=one_line(ran.problem or " ".join(said[:2]) or f"nvidia-smi ended with code {ran.code}"))
    found = parse(ran.out)
    if len(found.gpus) > 1:
        matrix = execute(("nvidia-smi", "topo", "-m"), SECONDS)
        found = msgspec.structs.replace(found, topology=matrix.out if matrix.code == 0 else "")
    return found


def parse(text: str) -> Smi:
    """The answer of `nvidia-smi -q -x`."""
    try:
        log = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        return Smi(problem=f"the answer of nvidia-smi cannot be read: {one_line(error)}")
    gpus = tuple(_gpu(item) for item in log.findall("gpu"))
    return Smi(True, _known(log, "driver_version"), _known(log, "cuda_version"), gpus,
               problem="" if gpus else "nvidia-smi lists no GPU")  # fmt: skip


def _gpu(item: ElementTree.Element) -> Gpu:
    link = "pci/pci_gpu_link_info/"
    errors = item.find("ecc_errors/volatile")
    counts = [] if errors is None else [
        _integer(field.text or "") or 0 for field in errors if "uncorrectable" in field.tag
    ]  # fmt: skip
    held = []
    for name in ("clocks_event_reasons", "clocks_throttle_reasons"):
        for field in item.findall(f"{name}/*"):
            reason = re.sub(r"^clocks_(event|throttle)_reason_", "", field.tag)
            if (field.text or "").strip() == "Active" and reason in REASONS and reason not in held:
                held.append(reason)
    programs = item.find("processes")
    return Gpu(
        name=_known(item, "product_name") or "GPU",
        address=_known(item, "pci/pci_bus_id") or item.get("id", ""),
        memory=_bytes(_known(item, "fb_memory_usage/total")),
        used=_bytes(_known(item, "fb_memory_usage/used")),
        programs=None if programs is None else len(programs.findall("process_info")),
        width=_lanes(_known(item, f"{link}link_widths/current_link_width")),
        width_most=_lanes(_known(item, f"{link}link_widths/max_link_width")),
        generation=_integer(_known(item, f"{link}pcie_gen/current_link_gen")),
        generation_most=_integer(_known(item, f"{link}pcie_gen/max_link_gen")),
        persistence={"Enabled": True, "Disabled": False}.get(_known(item, "persistence_mode")),
        compute_mode=_known(item, "compute_mode"),
        partitioned=_known(item, "mig_mode/current_mig") == "Enabled",
        uncorrected=sum(counts),
        remap_pending="Yes" in (_known(item, "remapped_rows/remapped_row_pending"),
                                _known(item, "retired_pages/pending_retirement")),
        remap_failed=_known(item, "remapped_rows/remapped_row_failure") == "Yes",
        temperature=_integer(_known(item, "temperature/gpu_temp")),
        held=tuple(held),
        limit=_watts(item, "current_power_limit", "enforced_power_limit", "power_limit"),
        limit_default=_watts(item, "default_power_limit"),
        limit_least=_watts(item, "min_power_limit"),
        limit_most=_watts(item, "max_power_limit"),
        clock_most=_integer(_known(item, "max_clocks/sm_clock")),
    )  # fmt: skip


def _watts(item: ElementTree.Element, *names: str) -> float | None:
    """`450.00 W` under the first name that has it; the group of these figures changed its name with driver 530."""
    for name in names:
        for group in ("gpu_power_readings", "power_readings"):
            found = re.match(r"(\d{1,5}(?:\.\d{1,4})?) W", _known(item, f"{group}/{name}"))
            if found:
                return float(found[1])
    return None


def _known(item: ElementTree.Element, path: str) -> str:
    text = (item.findtext(path) or "").strip()
    return "" if text in ("N/A", "[N/A]", "Unknown Error", "Requested functionality has been deprecated") else text


def _integer(text: str) -> int | None:
    """`-1`, `30 C`, `5` -> the number; None where there is none."""
    found = re.match(r"-?\d{1,12}", text)
    return int(found[0]) if found else None


def _lanes(text: str) -> int | None:
    """`16x`, `16` -> 16; what no link has (0, 63, 255: the kernel's words for unknown) is None."""
    found = _integer(text)
    return found if found in (1, 2, 4, 8, 12, 16, 32) else None


def _bytes(text: str) -> int | None:
    found = re.match(r"(\d{1,12})\s*MiB", text)
    return int(found[1]) * 2**20 if found else None


def links(matrix: str) -> dict[tuple[int, int], str]:
    """Pairs of GPUs -> the kind of link between them, from `nvidia-smi topo -m`.

    `NV18`: NVLink, 18 links; `PIX`, `PXB`: PCIe switches; `PHB`, `NODE`: over the processor; `SYS`: between sockets.
    """
    found: dict[tuple[int, int], str] = {}
    columns: list[int] = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", matrix).splitlines():
        cells = line.split()
        if not columns:
            columns = [int(cell[3:]) for cell in cells if re.fullmatch(r"GPU\d+", cell)]
        elif cells and re.fullmatch(r"GPU\d+", cells[0]):
            row = int(cells[0][3:])
            for column, cell in zip(columns, cells[1:], strict=False):
                if column > row and re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", cell):
                    found[(row, column)] = cell
    return found
