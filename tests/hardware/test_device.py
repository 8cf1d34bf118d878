"""Which device kinds are here, told by files of the kernel, without torch."""

from __future__ import annotations

import pytest

from upshift.hardware import device


@pytest.fixture
def system(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_NVIDIA", tmp_path / "gpus")
    monkeypatch.setattr(device, "_NODES", tmp_path / "dev")
    (tmp_path / "dev").mkdir()
    return tmp_path


def test_without_a_gpu_there_is_the_cpu(system):
    (system / "dev" / "nvidiactl").touch()  # the driver is loaded, but no device was handed to this container
    assert device.kinds_here() == ("cpu",)


def test_a_described_gpu_has_a_name(system):
    (system / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (system / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    assert device.kinds_here() == ("cuda", "cpu") and device.device_name("cuda:0") == "cuda NVIDIA H200"


def test_a_device_node_alone_is_a_gpu_without_a_name(system):
    (system / "dev" / "nvidia0").touch()
    assert device.kinds_here() == ("cuda", "cpu") and device.device_name("cuda:0") == "cuda"
