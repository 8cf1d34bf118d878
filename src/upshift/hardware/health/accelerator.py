"""The accelerator: is there one, can programs reach it, and is anything about it holding training back?"""

from __future__ import annotations

from collections.abc import Sequence

from upshift.hardware.health.check import Check
from upshift.hardware.health.gpus import REASONS, Gpu, Seen, links
from upshift.units import binary

#: Bytes on a GPU that no idle driver takes.
MUCH_USED = 2**30
#: A limit below this share of the default was set by somebody.
CAPPED = 0.99

_INSTALL = {
    "ubuntu": "ubuntu-drivers install", "pop": "apt-get install system76-driver-nvidia",
    "linuxmint": "ubuntu-drivers install", "fedora": "dnf install akmod-nvidia",
    "rhel": "dnf install nvidia-driver", "rocky": "dnf install nvidia-driver", "almalinux": "dnf install nvidia-driver",
    "arch": "pacman -S nvidia",
}  # fmt: skip


def driver(seen: Seen, apple: bool = False) -> Check:
    """Whether the GPUs that are there can be reached by programs; `apple`: torch can use an Apple GPU."""
    name, why = "GPU", "A training on a GPU is many times as fast as one on the CPU."
    smi = seen.smi
    count = max(len(seen.usable), len(smi.gpus))
    if smi.gpus:
        names = _counted([gpu.name for gpu in smi.gpus])
        cut = "; in parts (MIG)" if any(gpu.partitioned for gpu in smi.gpus) else ""
        upto = f", CUDA up to {smi.cuda}" if smi.cuda else ""
        found = f"{names}{cut}; driver {smi.driver or 'of unknown version'}{upto}"
        if len(seen.usable) > len(smi.gpus) and not seen.inside:
            return Check(name, "wrong", f"{found}; {len(seen.usable)} are on the bus", "A GPU is missing: the driver "
                         "has lost it.", "reboot    (before that: dmesg | grep -i nvrm)")  # fmt: skip
        return Check(name, "ok", found, why)
    if not seen.any_nvidia:
        if seen.nvidia:
            return Check(name, "note", "all GPUs are handed to virtual machines (vfio-pci)", why)
        other = "an AMD GPU" if seen.amd else "an Apple GPU" if apple else "none was seen; training runs on the CPU"
        return Check(name, "ok", other, why)
    here = f"{count} NVIDIA GPU{'s' if count != 1 else ''} on the bus" if count else "device files of an NVIDIA GPU"
    if "version mismatch" in smi.problem:
        return Check(name, "wrong", f"{here}; {smi.problem}", "The driver was updated while the old one is loaded: no "
                     "program can start the GPU.", "reboot")  # fmt: skip
    if not seen.devices:
        return _out_of_reach(seen, here)
    if smi.there:
        return Check(name, "wrong", f"{here}; {smi.problem}", "The driver does not answer: no program can use the GPU.",
                     "reboot    (before that: dmesg | grep -i nvrm)")  # fmt: skip
    version = f"driver {seen.module}" if seen.module else "a driver of unknown version"
    return Check(name, "note", f"{here}, {version}; there is no nvidia-smi", "Clocks, errors and links cannot be "
                 "looked at.", "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."
                 if seen.inside else "apt-get install nvidia-utils")  # fmt: skip


def _out_of_reach(seen: Seen, here: str) -> Check:
    """A GPU on the bus that has no device file."""
    if seen.inside:
        return Check("GPU", "wrong", f"{here}, but not in this container ({seen.inside})", "The container was started "
                     "without its GPU: training runs on the CPU.", "docker run --gpus all ...")  # fmt: skip
    if seen.module:
        return Check("GPU", "wrong", f"{here}, driver {seen.module} is loaded, but there is no /dev/nvidia0",
                     "Programs cannot reach the GPU.", "nvidia-modprobe -c 0 -u")  # fmt: skip
    by = {slot.driver for slot in seen.usable if slot.driver}
    instead = f"; {', '.join(sorted(by))} has it" if by else ""
    return Check("GPU", "wrong", f"{here}, but no NVIDIA driver is loaded{instead}", "Training runs on the CPU.",
                 _INSTALL.get(seen.distribution, "apt-get install nvidia-driver"))  # fmt: skip


def _counted(names: Sequence[str]) -> str:
    counts = {name: list(names).count(name) for name in names}
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def _these(gpus: Sequence[tuple[int, Gpu]], what: str) -> str:
    return "; ".join(f"GPU {number}: {what.format(gpu=gpu)}" for number, gpu in gpus)


def pcie(seen: Seen) -> Check | None:
    """The width of each GPU's link, against the widest it can have. Its speed falls while a GPU is idle: no fault."""
    why = "Batches and offloaded tensors go over it; half the lanes carry half as much."
    known = [(f"GPU {i}", gpu.address, gpu.width, gpu.width_most, gpu.generation_most)
             for i, gpu in enumerate(seen.smi.gpus) if gpu.width and gpu.width_most]  # fmt: skip
    if not known:
        known = [(slot.address, slot.address, slot.width, slot.width_most, None)
                 for slot in seen.usable if slot.width and slot.width_most]  # fmt: skip
    if not known:
        return Check("PCIe link", "unknown", "its width is not shown here", why) if seen.any_nvidia else None
    found = "; ".join(
        f"{name}: {width} of {most} lanes" + (f", generation {generation}" if generation else "")
        for name, _, width, most, generation in known
    )
    narrow = next((address for _, address, width, most, _ in known if (width or 0) < (most or 0)), "")
    if narrow:
        return Check("PCIe link", "note", found, f"{why} Another slot, or a card that sits well, gives all of them.",
                     f"lspci -vv -s {narrow} | grep -i lnksta")  # fmt: skip
    return Check("PCIe link", "ok", found, why)


def between(seen: Seen) -> Check | None:
    """How GPUs reach each other."""
    if len(seen.smi.gpus) < 2:
        return None
    why = "Gradients of several GPUs go over these links at each step; NVLink carries many times what PCIe does."
    found = links(seen.smi.topology)
    if not found:
        return Check("links between GPUs", "unknown", "nvidia-smi topo -m does not say", why)
    kinds = sorted(set(found.values()))
    text = ", ".join(f"{kind}: {sum(value == kind for value in found.values())} pairs" for kind in kinds)
    if all(kind.startswith("NV") for kind in kinds):
        return Check("links between GPUs", "ok", f"NVLink between all ({text})", why)
    near = [f"{a},{b}" for (a, b), kind in found.items() if kind.startswith("NV")]
    hint = f"export CUDA_VISIBLE_DEVICES={near[0]}    (a pair with NVLink)" if near else ""
    where = "some pairs cross between processor sockets" if "SYS" in kinds else "over PCIe"
    return Check("links between GPUs", "note" if "SYS" in kinds or near else "ok", f"{text}; {where}", why, hint)


def persistence(seen: Seen) -> Check | None:
    """Whether the driver stays loaded between programs."""
    known = [(i, gpu) for i, gpu in enumerate(seen.smi.gpus) if gpu.persistence is not None]
    if not known:
        return None
    why = "Without it the driver starts anew for every program: seconds each time, and clocks that begin cold."
    off = [(i, gpu) for i, gpu in known if not gpu.persistence]
    if off:
        return Check("persistence mode", "note", f"off on {len(off)} of {len(known)} GPUs", why, "nvidia-smi -pm 1")
    return Check("persistence mode", "ok", "on", why)


def memory_errors(seen: Seen) -> Check | None:
    """Errors in the memory of a GPU that could not be corrected."""
    if not seen.smi.gpus:
        return None
    why = "What is read there is wrong: losses jump, or the program ends with an ECC error."
    bad = [(i, gpu) for i, gpu in enumerate(seen.smi.gpus) if gpu.remap_failed]
    if bad:
        return Check("GPU memory errors", "wrong", _these(bad, "a faulty row could not be replaced"), why,
                     f"export CUDA_VISIBLE_DEVICES={_others(seen, bad)}    (and have the card replaced)")  # fmt: skip
    bad = [(i, gpu) for i, gpu in enumerate(seen.smi.gpus) if gpu.uncorrected or gpu.remap_pending]
    if bad:
        words = "{gpu.uncorrected} uncorrected since the driver started"
        if any(gpu.remap_pending for _, gpu in bad):
            words += ", a row waits to be replaced"
        return Check("GPU memory errors", "wrong", _these(bad, words), why,
                     f"nvidia-smi --gpu-reset -i {bad[0][0]}    (with nothing running on it)")  # fmt: skip
    return Check("GPU memory errors", "ok", "none that could not be corrected", why)


def _others(seen: Seen, bad: Sequence[tuple[int, Gpu]]) -> str:
    out = {number for number, _ in bad}
    return ",".join(str(number) for number in range(len(seen.smi.gpus)) if number not in out)


def clocks(seen: Seen) -> Check | None:
    """What holds the clocks of a GPU down now."""
    if not seen.smi.gpus:
        return None
    why = "A GPU at low clocks computes more slowly, and times taken on it do not compare."
    lines, worst = list[str](), set[str]()
    for number, gpu in enumerate(seen.smi.gpus):
        if gpu.held:
            hot = f" at {gpu.temperature:g} °C" if gpu.temperature is not None else ""
            lines.append(f"GPU {number}{hot}: {', '.join(REASONS[reason] for reason in gpu.held)}")
            worst.update(gpu.held)
    if not worst:
        return Check("GPU clocks", "ok", "nothing holds them down now", why)
    found = "; ".join(lines)
    if worst & {"hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown", "hw_slowdown"}:
        return Check("GPU clocks", "wrong", found, f"{why} Cooling or power is not enough.",
                     "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER    (then: air, fans, power cables)")  # fmt: skip
    if "applications_clocks_setting" in worst:
        return Check("GPU clocks", "note", found, why, "nvidia-smi -rac && nvidia-smi -rgc    (lets them go)")
    return Check("GPU clocks", "note", found, why, "nvidia-smi -q -d POWER,PERFORMANCE")


def power_limit(seen: Seen) -> Check | None:
    """What each GPU may draw, against its default. A cap is a choice that costs time and saves energy: no fault."""
    known = [(i, gpu) for i, gpu in enumerate(seen.smi.gpus) if gpu.limit is not None]
    if not known:
        return None
    lines, capped = [], []
    for number, gpu in known:
        default = f" of {gpu.limit_default:g} W by default" if gpu.limit_default is not None else ""
        known_range = gpu.limit_least is not None and gpu.limit_most is not None
        settable = f", {gpu.limit_least:g} W to {gpu.limit_most:g} W can be set" if known_range else ""
        clock = f"; clock up to {gpu.clock_most:g} MHz" if gpu.clock_most else ""
        lines.append(f"GPU {number}: {gpu.limit:g} W{default}{settable}{clock}")
        if gpu.limit_default is not None and (gpu.limit or 0.0) < CAPPED * gpu.limit_default:
            capped.append((number, gpu))
    why = "Less power means longer steps, and often less energy for the same training; only measuring tells which cap."
    if not capped:
        return Check("GPU power limit", "ok", "; ".join(lines), why)
    number, gpu = capped[0]
    return Check("GPU power limit", "note", "; ".join(lines), f"{why} Runs with another limit do not compare.",
                 f"nvidia-smi -i {number} -pl {gpu.limit_default:g}    (back to the default; needs root)")  # fmt: skip


def taken(seen: Seen) -> Check | None:
    """Memory of GPUs that others hold, and modes that keep programs out."""
    if not seen.smi.gpus:
        return None
    shut = [(i, gpu) for i, gpu in enumerate(seen.smi.gpus) if gpu.compute_mode == "Prohibited"]
    if shut:
        return Check("GPU in use", "wrong", _these(shut, "compute mode {gpu.compute_mode}"),
                     "No program may compute on it.", f"nvidia-smi -i {shut[0][0]} -c DEFAULT")  # fmt: skip
    why = "Other programs take memory and time; batch sizes found now do not hold later."
    held = [(i, gpu) for i, gpu in enumerate(seen.smi.gpus) if (gpu.used or 0) > MUCH_USED and not gpu.partitioned]
    if held:
        found = "; ".join(
            f"GPU {i}: {binary(gpu.used or 0)}"
            + (f" of {binary(gpu.memory)}" if gpu.memory else "")
            + " held by others"
            for i, gpu in held
        )
        return Check("GPU in use", "note", found, why, "nvidia-smi    (lists them)")
    return Check("GPU in use", "ok", "by no one else", why)
