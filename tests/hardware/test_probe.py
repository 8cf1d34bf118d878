"""The probe gives what it measured, keeps it, and says what it cannot measure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.errors import UsageError
from upshift.hardware import probe as module
from upshift.hardware.probe import Peak, Peaks, main, peak_of, probe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Short: these tests are of the probe's conduct, not of the machine.
    monkeypatch.setattr(module, "BUDGET_CPU", 0.2)
    return tmp_path / "cache"


@given(st.lists(st.floats(1.0, 1e15), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_peak_is_an_order_statistic_inside_its_interval(samples: list[float]) -> None:
    peak = peak_of(samples, "FLOP/s")
    assert peak.value in samples and peak.low in samples and peak.high in samples
    assert peak.low is not None and peak.high is not None and peak.value is not None
    assert peak.low <= peak.value <= peak.high <= max(samples)
    assert peak.n == len(samples)


def test_the_interval_covers_the_true_quantile() -> None:
    """Against the exact coverage of order statistics, by simulation from a known distribution."""
    import random

    generator = random.Random(1)
    hits = 0
    for _ in range(800):
        peak = peak_of([generator.random() for _ in range(80)], "1")
        assert peak.low is not None and peak.high is not None
        hits += peak.low <= module.QUANTILE <= peak.high
    assert 0.93 <= hits / 800 <= 0.995


def test_no_sample_is_unknown() -> None:
    assert peak_of([], "B/s") == Peak(value=None, unit="B/s", basis="unknown")


def test_cpu_is_measured_and_settings_are_put_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_USE", 0.0)
    threads = torch.get_num_threads()
    peaks = probe("cpu", threads=1)
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()
    assert set(peaks.flops) >= {"float32", "float64", "bfloat16"}
    for peak in (*peaks.flops.values(), peaks.bandwidth):
        assert peak.basis == "measured" and peak.n >= 1 and peak.value is not None
        assert math.isfinite(peak.value) and peak.value > 1e6
    assert peaks.threads == 1 and peaks.device_name and peaks.torch == str(torch.__version__)
    (kept,) = (cache / "upshift").iterdir()
    assert msgspec.json.decode(kept.read_bytes(), type=Peaks) == peaks
    # Read back, not measured again: the figures are equal to the last digit.
    assert probe("cpu", threads=1) == peaks
    assert probe("cpu", threads=1, refresh=True).flops != peaks.flops
    kept.write_text("{ torn")
    assert probe("cpu", threads=1).flops.keys() == peaks.flops.keys()


def test_a_busy_machine_is_said_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_USE", 10.0)  # no machine gives a process ten times its cores
    peaks = probe("cpu", threads=1)
    assert any("other work was running" in note for note in peaks.notes)
    assert not cache.exists()


def test_an_unwritable_cache_only_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_USE", 0.0)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert probe("cpu", threads=1).bandwidth.value


def test_the_cache_tells_machines_apart() -> None:
    base = module.cache_file("X", 4, "2.10", 4)
    changed = [("Y", 4, "2.10", 4), ("X", 2, "2.10", 4), ("X", 4, "2.11", 4), ("X", 4, "2.10", 1)]
    others = [module.cache_file(*item) for item in changed]
    assert len({base, *others}) == 5


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_an_unknown_device_is_said_not_guessed(device: str) -> None:
    peaks = probe(device)
    assert peaks.flops == {} and peaks.bandwidth.value is None and peaks.bandwidth.basis == "unknown"
    assert device in peaks.notes[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_said() -> None:
    assert "no CUDA device" in probe("cuda").notes[0]


def test_nonsense_is_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError) as caught:
        probe("tostr")
    assert "cuda:0" in caught.value.remedy


def test_main_writes_the_record_and_speaks_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peaks.json"
    assert main(["--device", "cpu", "--threads", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "float32" in err
    assert json.loads(file.read_bytes())["flops"]["float32"]["value"] > 0
    assert main(["--device", "tostr"]) == 2


@pytest.mark.cuda
def test_cuda_is_measured() -> None:
    precision = torch.backends.cuda.matmul.fp32_precision
    peaks = probe("cuda", refresh=True)
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert peaks.flops["float32"].value and peaks.bandwidth.value
    if "bfloat16" in peaks.flops:
        assert (peaks.flops["bfloat16"].value or 0) > (peaks.flops["float32"].value or 0)
