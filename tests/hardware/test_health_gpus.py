"""GPUs: what is said of them where there are none, with a driver that works, is broken or is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.hardware.health import accelerator, gpus
from upshift.hardware.health.check import Check, Ran
from upshift.hardware.health.gpus import Gpu, Seen, Slot, Smi

CARD = """
  <gpu id="00000000:04:00.0">
    <product_name>NVIDIA H100</product_name>
    <persistence_mode>{persistence}</persistence_mode>
    <mig_mode><current_mig>Disabled</current_mig></mig_mode>
    <pci><pci_bus_id>00000000:04:00.0</pci_bus_id><pci_gpu_link_info>
      <pcie_gen><max_link_gen>5</max_link_gen><current_link_gen>1</current_link_gen></pcie_gen>
      <link_widths><max_link_width>16x</max_link_width><current_link_width>{width}</current_link_width></link_widths>
    </pci_gpu_link_info></pci>
    <clocks_{kind}_reasons>
      <clocks_{kind}_reason_gpu_idle>Active</clocks_{kind}_reason_gpu_idle>
      <clocks_{kind}_reason_sw_power_cap>Not Active</clocks_{kind}_reason_sw_power_cap>
      <clocks_{kind}_reason_hw_thermal_slowdown>{hot}</clocks_{kind}_reason_hw_thermal_slowdown>
    </clocks_{kind}_reasons>
    <fb_memory_usage><total>81559 MiB</total><used>{used} MiB</used></fb_memory_usage>
    <compute_mode>{mode}</compute_mode>
    <ecc_errors><volatile>
      <sram_correctable>7</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <dram_uncorrectable>{errors}</dram_uncorrectable>
    </volatile></ecc_errors>
    <remapped_rows><remapped_row_pending>{pending}</remapped_row_pending>
      <remapped_row_failure>{failure}</remapped_row_failure></remapped_rows>
    <temperature><gpu_temp>91 C</gpu_temp></temperature>
    <processes><process_info><pid>1</pid><type>C</type></process_info></processes>
  </gpu>"""
WELL = {"persistence": "Enabled", "width": "16x", "kind": "event", "hot": "Not Active", "used": "4", "mode": "Default",
        "errors": "0", "pending": "No", "failure": "No"}  # fmt: skip


def log(*cards: dict[str, str]) -> str:
    body = "".join(CARD.format(**{**WELL, **card}) for card in cards)
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>'
        f"<driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version>{body}</nvidia_smi_log>"
    )


def seen(*cards: dict[str, str], **changes: object) -> Seen:
    return Seen(devices=True, module="580.65.06", smi=gpus.parse(log(*cards)), **changes)  # type: ignore[arg-type]


PER_CARD = (accelerator.pcie, accelerator.persistence, accelerator.memory_errors, accelerator.clocks, accelerator.taken,
            accelerator.between)  # fmt: skip


def test_a_machine_without_gpus_gives_no_complaint(tmp_path):
    nothing = gpus.look(tmp_path, lambda command, seconds: Ran(None, problem="nvidia-smi cannot be started: none"), {})
    assert not nothing.any_nvidia
    assert accelerator.driver(nothing).state == "ok"
    assert [check(nothing) for check in PER_CARD] == [None] * len(PER_CARD)


def test_a_driver_left_over_without_a_gpu_gives_no_complaint(tmp_path):
    failed = Ran(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")
    found = gpus.look(tmp_path, lambda command, seconds: failed, {})
    assert accelerator.driver(found).state == "ok" and [check(found) for check in PER_CARD] == [None] * len(PER_CARD)


def test_a_gpu_that_is_well():
    found = seen({})
    gpu = found.smi.gpus[0]
    assert gpu == Gpu("NVIDIA H100", "00000000:04:00.0", 81559 * 2**20, 4 * 2**20, 1, 16, 16, 1, 5, True, "Default",
                      temperature=91)  # fmt: skip
    assert [check(found).state for check in PER_CARD[:-1]] == ["ok"] * 5  # type: ignore[union-attr]
    said = accelerator.driver(found)
    assert said.state == "ok" and "NVIDIA H100; driver 580.65.06, CUDA up to 13.0" in said.found


@pytest.mark.parametrize(
    ("card", "check", "state", "said"),
    [
        ({"width": "8x"}, accelerator.pcie, "note", "8 of 16 lanes"),
        ({"persistence": "Disabled"}, accelerator.persistence, "note", "off"),
        ({"errors": "3"}, accelerator.memory_errors, "wrong", "3 uncorrected"),
        ({"pending": "Yes"}, accelerator.memory_errors, "wrong", "waits to be replaced"),
        ({"failure": "Yes"}, accelerator.memory_errors, "wrong", "could not be replaced"),
        ({"hot": "Active"}, accelerator.clocks, "wrong", "91 °C: too hot"),
        ({"hot": "Active", "kind": "throttle"}, accelerator.clocks, "wrong", "too hot"),
        ({"used": "40000"}, accelerator.taken, "note", "39.1 GiB of 79.6 GiB"),
        ({"mode": "Prohibited"}, accelerator.taken, "wrong", "Prohibited"),
    ],
)
def test_what_is_the_matter_with_a_gpu(card, check, state, said):
    found = check(seen({}, card))
    assert found.state == state and said in found.found and "GPU 0: 8" not in found.found and found.mend
    assert "81559" not in found.found


def test_pinned_clocks_and_a_power_limit_are_notes():
    for reason in ("applications_clocks_setting", "sw_power_cap"):
        found = accelerator.clocks(Seen(smi=Smi(gpus=(Gpu(held=(reason,)),))))
        assert found is not None and found.state == "note" and found.mend


POWER = """<nvidia_smi_log><gpu><product_name>H200</product_name><max_clocks><sm_clock>1980 MHz</sm_clock></max_clocks>
<{group}><{now}>{limit}</{now}><default_power_limit>700.00 W</default_power_limit>
<min_power_limit>200.00 W</min_power_limit><max_power_limit>700.00 W</max_power_limit></{group}>
<module_power_readings><current_power_limit>1000.00 W</current_power_limit></module_power_readings>
</gpu></nvidia_smi_log>"""


@pytest.mark.parametrize(
    ("group", "now"),
    [("gpu_power_readings", "current_power_limit"), ("power_readings", "enforced_power_limit"),
     ("power_readings", "power_limit")],
)  # fmt: skip
@pytest.mark.parametrize(("limit", "state"), [("700.00 W", "ok"), ("695.00 W", "ok"), ("450.00 W", "note")])
def test_a_power_limit_below_its_default_is_a_note_with_the_way_back(group, now, limit, state):
    smi = gpus.parse(POWER.format(group=group, now=now, limit=limit))
    found = accelerator.power_limit(Seen(devices=True, smi=smi))
    assert found is not None and found.state == state
    shown = f"GPU 0: {float(limit[:-2]):g} W of 700 W by default, 200 W to 700 W can be set; clock up to 1980 MHz"
    assert found.found == shown
    assert ("nvidia-smi -i 0 -pl 700" in found.mend) is (state == "note")


@pytest.mark.parametrize("limit", ["N/A", "", "[Unknown Error]", "W", "1e9 W", "-5 W"])
def test_a_power_limit_that_is_not_told_is_no_check(limit):
    smi = gpus.parse(POWER.format(group="gpu_power_readings", now="current_power_limit", limit=limit))
    assert accelerator.power_limit(Seen(devices=True, smi=smi)) is None
    assert accelerator.power_limit(Seen()) is None


def test_a_limit_above_the_default_as_laptops_have_it_is_well():
    smi = Smi(gpus=(Gpu(limit=95.0, limit_default=55.0),))
    found = accelerator.power_limit(Seen(smi=smi))
    assert found is not None and found.state == "ok" and found.found == "GPU 0: 95 W of 55 W by default"


def test_fields_a_driver_does_not_know_are_left_out():
    old = gpus.parse("<nvidia_smi_log><gpu><product_name>Tesla K80</product_name>"
                     "<persistence_mode>N/A</persistence_mode><fb_memory_usage><used>N/A</used></fb_memory_usage>"
                     "</gpu></nvidia_smi_log>")  # fmt: skip
    found = Seen(devices=True, smi=old)
    assert old.gpus == (Gpu("Tesla K80"),)
    states = [None if (check := look(found)) is None else check.state for look in PER_CARD]
    assert states == ["unknown", None, "ok", "ok", "ok", None]


# -- a driver that is broken or missing --------------------------------------------------------------------------------


def card(root: Path, address: str, driver: str = "", vendor: str = "0x10de", kind: str = "0x030200") -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in (("vendor", vendor), ("class", kind), ("numa_node", "1"), ("current_link_width", "8"),
                       ("max_link_width", "255")):  # fmt: skip
        (folder / name).write_text(f"{text}\n")
    if driver:
        (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)


NO_SMI = Ran(None, problem="nvidia-smi cannot be started: No such file or directory")


def look(root: Path, answer: Ran, env: dict[str, str] | None = None) -> Check:
    return accelerator.driver(gpus.look(root, lambda command, seconds: answer, env or {}))


def test_a_gpu_without_a_driver(tmp_path):
    card(tmp_path, "0000:01:00.0", "nouveau")
    card(tmp_path, "0000:01:00.1", kind="0x040300")  # the sound device of the same card
    card(tmp_path, "0000:00:02.0", vendor="0x8086")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text("ID=ubuntu\n")
    found = look(tmp_path, NO_SMI)
    assert found.state == "wrong" and found.mend == "ubuntu-drivers install"
    assert "1 NVIDIA GPU on the bus" in found.found and "nouveau has it" in found.found
    assert gpus.slots(tmp_path, gpus.NVIDIA) == (Slot("0000:01:00.0", "nouveau", 1, 8, None),)


def test_a_container_without_its_gpu(tmp_path):
    card(tmp_path, "0000:01:00.0", "nvidia")
    (tmp_path / ".dockerenv").touch()
    found = look(tmp_path, NO_SMI)
    assert found.state == "wrong" and "--gpus all" in found.mend


def test_a_loaded_driver_without_device_files(tmp_path):
    card(tmp_path, "0000:01:00.0", "nvidia")
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:15:41 UTC 2025\n"
    )
    found = look(tmp_path, NO_SMI)
    assert found.state == "wrong" and "580.65.06" in found.found and found.mend.startswith("nvidia-modprobe")


def test_a_gpu_handed_to_a_virtual_machine_is_no_fault(tmp_path):
    card(tmp_path, "0000:01:00.0", "vfio-pci")
    assert look(tmp_path, NO_SMI).state == "note"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Ran(18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library: 580\n"), "was updated"),
        (Ran(9, "", "couldn't communicate with the NVIDIA driver"), "does not answer"),
        (Ran(None, problem="nvidia-smi did not end within 10 s"), "does not answer"),
        (Ran(0, "<nvidia_smi_log></nvidia_smi_log>"), "does not answer"),
        (Ran(0, "Segmentation fault"), "does not answer"),
        (Ran(6, "No devices were found\n"), "does not answer"),
    ],
)
def test_a_driver_that_does_not_answer(tmp_path, answer, said):
    card(tmp_path, "0000:01:00.0", "nvidia")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    found = look(tmp_path, answer)
    assert found.state == "wrong" and found.mend.startswith("reboot") and said in found.why
    everything = gpus.look(tmp_path, lambda command, seconds: answer, {})
    assert all(check is None or check.state != "wrong" for check in (item(everything) for item in PER_CARD))


def test_a_linux_inside_windows_without_nvidia_is_no_gpu_machine(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert look(tmp_path, NO_SMI).state == "ok"
    (tmp_path / "usr/lib/wsl/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/wsl/lib/nvidia-smi").touch()
    assert look(tmp_path, NO_SMI).state == "note"


def test_device_files_without_nvidia_smi(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert look(tmp_path, NO_SMI).state == "note"


def test_a_gpu_that_fell_off_the_bus(tmp_path):
    card(tmp_path, "0000:01:00.0", "nvidia")
    card(tmp_path, "0000:02:00.0", "nvidia")
    found = look(tmp_path, Ran(0, log({})))
    assert found.state == "wrong" and "2 are on the bus" in found.found


@given(st.text(max_size=200), st.integers(-10, 300), st.text(max_size=50))
def test_whatever_nvidia_smi_says_nothing_is_raised(out, code, err):
    def execute(command: Sequence[str], seconds: float) -> Ran:
        return Ran(code, out, err)

    smi = gpus.ask(execute)
    assert smi.gpus or smi.problem
    gpus.links(out)


@settings(max_examples=40, deadline=None)
@given(st.builds(Gpu, width=st.none() | st.just(8), width_most=st.none() | st.just(16),
                 persistence=st.none() | st.booleans(), uncorrected=st.integers(0, 9), remap_pending=st.booleans(),
                 remap_failed=st.booleans(), used=st.none() | st.integers(0, 2**40), memory=st.none(),
                 compute_mode=st.sampled_from(["", "Default", "Prohibited", "Exclusive_Process"]),
                 temperature=st.none() | st.floats(0, 120),
                 held=st.lists(st.sampled_from(sorted(gpus.REASONS)), unique=True).map(tuple)),
       st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans())  # fmt: skip
def test_what_is_not_well_has_a_why_and_what_is_wrong_a_mend(gpu, count, slots, devices, there):
    for smi in (Smi(gpus=(gpu,) * count), Smi(there=there, problem="no")):
        machine = Seen(tuple(Slot(str(i)) for i in range(slots)), devices=devices, smi=smi)
        for check in (accelerator.driver, *PER_CARD):
            found = check(machine)
            assert found is None or (found.found and found.why)
            assert found is None or found.state != "wrong" or found.mend


# -- links between GPUs ------------------------------------------------------------------------------------------------

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
    "GPU0\t X \t{a}\t{b}\tPIX\t0-31\t0\nGPU1\t{a}\t X \t{c}\tSYS\t0-31\t0\nGPU2\t{b}\t{c}\t X \tSYS\t0-31\t0\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n  X    = Self\n  SYS  = Connection traversing PCIe\n"
)


@pytest.mark.parametrize(
    ("kinds", "state", "mend"),
    [(("NV18", "NV18", "NV18"), "ok", ""), (("NV4", "SYS", "SYS"), "note", "export CUDA_VISIBLE_DEVICES=0,1"),
     (("PHB", "PHB", "PHB"), "ok", ""), (("SYS", "SYS", "SYS"), "note", "")],
)  # fmt: skip
def test_links_between_gpus(kinds, state, mend):
    a, b, c = kinds
    text = TOPOLOGY.format(a=a, b=b, c=c)
    assert gpus.links(text) == {(0, 1): a, (0, 2): b, (1, 2): c}
    three = msgspec.structs.replace(gpus.parse(log({}, {}, {})), topology=text)
    found = accelerator.between(Seen(devices=True, smi=three))
    assert found is not None and found.state == state and found.mend.startswith(mend) and bool(found.mend) == bool(mend)


def test_no_word_about_links():
    found = accelerator.between(seen({}, {}))
    assert found is not None and found.state == "unknown"
