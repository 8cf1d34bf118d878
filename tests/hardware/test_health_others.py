"""AMD's GPUs and TPUs from recorded trees: what is said of them, and of machines that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.hardware.health import build, gpus, others
from upshift.hardware.health.build import TorchFacts
from upshift.hardware.health.check import Ran

NO_TOOL = Ran(None, problem="rocm-smi cannot be started: No such file or directory")


def silent(command, seconds):
    return NO_TOOL


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def device(address: str, **fields: str) -> dict[str, str]:
    return {f"sys/bus/pci/devices/{address}/{name}": f"{text}\n" for name, text in fields.items()}


def with_driver(root: Path, address: str, name: str) -> None:
    (root / "sys/bus/pci/drivers" / name).mkdir(parents=True, exist_ok=True)
    (root / "sys/bus/pci/devices" / address / "driver").symlink_to(root / "sys/bus/pci/drivers" / name)


def node(number: int, target: int) -> dict[str, str]:
    lines = f"cpu_cores_count 0\nsimd_count 304\ngfx_target_version {target}\nvendor_id 4098\n"
    return {f"sys/class/kfd/kfd/topology/nodes/{number}/properties": lines}


@pytest.fixture
def mi300(tmp_path):
    """Two MI300X, which the bus calls accelerators, with the driver and ROCm."""
    for place in ("0000:0c:00.0", "0000:22:00.0"):
        put(tmp_path, device(place, vendor="0x1002", **{"class": "0x120000"}, product_name="AMD Instinct MI300X"))
        with_driver(tmp_path, place, "amdgpu")
    put(tmp_path, {**node(0, 0), **node(1, 90402), **node(2, 90402)})
    return put(tmp_path, {"dev/kfd": "", "opt/rocm/.info/version": "7.1.0-44\n"})


# -- AMD ---------------------------------------------------------------------------------------------------------------


def test_a_machine_without_any_says_nothing(tmp_path):
    assert others.amd(others.look_amd(tmp_path, silent, {})) is None
    assert others.tpu(others.look_tpu(tmp_path, {}, lambda name: None)) is None
    assert others.tpu(others.look_tpu(tmp_path, {}, lambda name: "2.9.0")) is None, "the package alone is no device"


def test_gpus_that_can_be_used_are_named(mi300):
    found = others.amd(others.look_amd(mi300, silent, {}, lambda path: True))
    assert found is not None and found.state == "ok" and not found.mend
    assert found.found.startswith("2 x AMD Instinct MI300X (gfx942); ROCm 7.1.0")


def test_a_user_who_may_not_open_it_is_told_the_groups(mi300):
    found = others.amd(others.look_amd(mi300, silent, {}, lambda path: False))
    assert found is not None and found.state == "note" and "render,video" in found.mend


def test_in_a_container_that_was_not_given_it(mi300):
    (mi300 / "dev/kfd").unlink()
    put(mi300, {".dockerenv": ""})
    found = others.amd(others.look_amd(mi300, silent, {}))
    assert found is not None and found.state == "note" and "docker" in found.found and "--device /dev/kfd" in found.mend


def test_without_the_driver_and_without_its_topology(tmp_path):
    put(tmp_path, device("0000:03:00.0", vendor="0x1002", **{"class": "0x030000"}))
    found = others.amd(others.look_amd(tmp_path, silent, {}))
    assert found is not None and found.state == "note" and found.mend == "modprobe amdgpu"
    with_driver(tmp_path, "0000:03:00.0", "amdgpu")
    found = others.amd(others.look_amd(tmp_path, silent, {}))
    assert found is not None and found.state == "note" and "/dev/kfd" in found.found
    put(tmp_path, {"dev/kfd": ""})
    found = others.amd(others.look_amd(tmp_path, silent, {}, lambda path: True))
    assert found is not None and found.state == "unknown"


@pytest.mark.parametrize(
    ("number", "target"), [(90402, "gfx942"), (90010, "gfx90a"), (120001, "gfx1201"), (100300, "gfx1030")]
)
def test_targets_as_compilers_write_them(tmp_path, number, target):
    put(tmp_path, {"dev/kfd": "", **node(0, 0), **node(1, number)})
    assert others.look_amd(tmp_path, silent, {}).targets == (target,)


@pytest.mark.parametrize("key", ["Card Series", "Card series"])
def test_rocm_smi_gives_the_name_where_the_kernel_has_none(tmp_path, key):
    put(tmp_path, device("0000:03:00.0", vendor="0x1002", **{"class": "0x030000"}))
    answer = Ran(0, json.dumps({"card0": {key: "Radeon RX 7900 XTX", "GFX Version": "gfx1100"}, "system": "x"}))
    assert others.look_amd(tmp_path, lambda command, seconds: answer, {}).names == ("Radeon RX 7900 XTX",)


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps),
                 st.dictionaries(st.text(), st.dictionaries(st.text(), st.integers())).map(json.dumps)))  # fmt: skip
def test_whatever_rocm_smi_answers_nothing_raises(text):
    assert others._names(lambda command, seconds: Ran(0, text)) == ()


def test_an_amd_processor_or_another_maker_is_no_gpu(tmp_path):
    put(tmp_path, device("0000:00:00.0", vendor="0x1022", **{"class": "0x060000"}))
    put(tmp_path, device("0000:01:00.0", vendor="0x10de", **{"class": "0x030000"}))
    put(tmp_path, device("0000:02:00.0", vendor="0x1002", **{"class": "0x040300"}))
    assert others.look_amd(tmp_path, silent, {}).slots == 0


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_build_for_another_device_beside_an_amd_gpu_is_said(cuda):
    facts = TorchFacts(version="2.13.0", cuda=cuda, started=False if cuda else None)
    found = build.torch_device(facts, False, True, "", None)
    assert found is not None and found.state == "note" and "AMD GPU" in found.found and "rocm" in found.mend


# -- TPUs --------------------------------------------------------------------------------------------------------------


def chips(root: Path, number: str, count: int) -> Path:
    for place in range(count):
        put(root, device(f"0000:00:0{place}.0", vendor="0x1ae0", device=number))
    return root


def packages(**found):
    return lambda name: found.get(name)


READY = packages(torch_xla="2.9.0", libtpu="0.0.21")


def test_a_tpu_with_all_it_needs(tmp_path):
    env = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "PJRT_DEVICE": "TPU"}
    found = others.tpu(others.look_tpu(chips(tmp_path, "0x0063", 4), env, READY), "2.9.1+cpu")
    assert found is not None and found.state == "ok"
    assert found.found == "4 x TPU v5e, v5litepod-4; torch_xla 2.9.0, libtpu 0.0.21"


@pytest.mark.parametrize(
    ("version", "torch", "env", "said", "mend"),
    [
        (packages(), "2.9.1", {}, "not installed", "torch_xla[tpu]==2.9.*"),
        (packages(), "", {}, "not installed", "'torch_xla[tpu]'"),
        (READY, "2.13.0", {}, "beside torch 2.13.0", "torch_xla[tpu]==2.13.*"),
        (packages(torch_xla="2.9.0"), "2.9.0", {}, "without libtpu", "torch_xla[tpu]"),
        (READY, "2.9.0", {"PJRT_DEVICE": "CPU"}, "PJRT_DEVICE=CPU", "export PJRT_DEVICE=TPU"),
    ],
)
def test_what_a_tpu_lacks(tmp_path, version, torch, env, said, mend):
    found = others.tpu(others.look_tpu(chips(tmp_path, "0x006f", 1), env, version), torch)
    assert found is not None and found.state == "note" and said in found.found and mend in found.mend
    assert "1 x TPU v6e" in found.found


def test_device_files_alone_are_a_tpu_of_unknown_generation(tmp_path):
    put(tmp_path, {"dev/accel0": "", "dev/accel1": ""})
    found = others.tpu(others.look_tpu(tmp_path, {}, READY), "2.9.0")
    assert found is not None and found.state == "ok" and "2 x TPU of unknown generation" in found.found


def test_the_kernel_s_own_accelerators_are_none(tmp_path):
    put(tmp_path, {"dev/accel/accel0": "", "dev/vfio/12": ""})
    assert others.tpu(others.look_tpu(tmp_path, {}, READY)) is None


def test_variables_without_a_device(tmp_path):
    env = {"PJRT_DEVICE": "TPU"}
    missing = others.tpu(others.look_tpu(chips(tmp_path, "0x9999", 1), env, READY))
    assert missing is not None and missing.state == "note" and "none is seen" in missing.found and missing.mend
    bare = put(tmp_path / "bare", {"dev/vfio/0": ""})
    unreadable = others.tpu(others.look_tpu(bare, env, READY))
    assert unreadable is not None and unreadable.state == "unknown" and "/dev/vfio" in unreadable.found


def test_both_are_among_the_checks_of_a_machine():
    from upshift.hardware.health.whole import _accelerator

    names = [name for _, name, _ in _accelerator(TorchFacts, gpus.Seen)]
    assert {"AMD GPU", "TPU", "GPU power limit"} <= set(names)
