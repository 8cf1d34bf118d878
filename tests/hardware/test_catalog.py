from __future__ import annotations

import pytest

from upshift.hardware import catalog


def test_every_entry_has_a_source_and_plausible_peaks() -> None:
    for name, device in catalog.devices().items():
        assert device.source and device.date.isdigit(), name
        assert device.float32 is not None and 1e12 < device.float32 < 1e15
        fast = device.bfloat16 or device.float16
        assert fast is not None and fast > device.float32
        if device.tf32 is not None:
            assert device.float32 <= device.tf32 <= fast
        assert 1e10 < device.memory < 1e12 and 1e11 < device.bandwidth < 1e13


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_devices_are_found_by_the_drivers_name(name: str, key: str) -> None:
    found = catalog.find(name)
    assert found is not None and found[0] == key


@pytest.mark.parametrize(
    "name",
    ["", "NVIDIA L40S", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA H100 PCIe", "AMD EPYC",
     "NVIDIA H200 MIG 1g.18gb", "Tesla T40"],
)  # fmt: skip
def test_an_unknown_device_is_not_guessed(name: str) -> None:
    assert catalog.find(name) is None
