"""Joules: counters on a made-up machine, an estimate against CPU time that is known, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from upshift.errors import EnvironmentError_, MissingExtraError, UsageError
from upshift.hardware.watts import Watts, parse, stated
from upshift.measure.counters import Rapl
from upshift.measure.power import Estimate, meter
from upshift.measure.tree import Tree

WATTS = Watts(1.0, 5.0, "made up")
NOWHERE = Path("/nonexistent")


# -- RAPL --------------------------------------------------------------------------------------------------------------


class Powercap:
    """A folder like /sys/class/powercap."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, folder: str, name: str, microjoules: int = 0, most: int = 1_000_000_000) -> None:
        path = self.root / folder
        path.mkdir(exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{microjoules}\n")
        (path / "max_energy_range_uj").write_text(f"{most}\n")

    def set(self, folder: str, microjoules: int) -> None:
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    made = Powercap(tmp_path)
    (tmp_path / "intel-rapl").mkdir()
    made.zone("intel-rapl:0", "package-0", 5_000_000)
    made.zone("intel-rapl:0:0", "core", 1_000_000)
    made.zone("intel-rapl:0:1", "dram", 7_000_000)
    made.zone("intel-rapl:1", "package-1", 100)
    made.zone("intel-rapl:2", "psys", 9_000_000)
    return made


def test_packages_and_their_memory_are_counted_once(powercap):
    found = Rapl.here(powercap.root)
    assert found is not None and "package-0, dram, package-1" in found.what and "other work" in found.what
    joules = found.begin(1)
    for folder, microjoules in (("intel-rapl:0", 8_000_000), ("intel-rapl:0:0", 2_500_000),
                                ("intel-rapl:0:1", 7_500_000), ("intel-rapl:1", 250_100),
                                ("intel-rapl:2", 90_000_000)):  # fmt: skip
        powercap.set(folder, microjoules)
    assert joules() == pytest.approx(3.0 + 0.5 + 0.25)
    assert joules() == pytest.approx(3.75), "a look adds nothing"


def test_a_counter_that_goes_round_twice_loses_nothing(tmp_path):
    powercap = Powercap(tmp_path)
    powercap.zone("intel-rapl:0", "package-0", 9_000_000, most=10_000_000)
    joules = Rapl.here(tmp_path).begin(1)
    seen = []
    for microjoules in (500_000, 9_900_000, 100_000):
        powercap.set("intel-rapl:0", microjoules)
        seen.append(joules())
    assert seen == pytest.approx([1.5, 10.9, 11.1])


def test_counters_that_stand_still_or_go_away_measure_nothing(powercap):
    joules = Rapl.here(powercap.root).begin(1)
    assert joules() is None
    powercap.set("intel-rapl:0", 6_000_000)
    assert joules() == 1.0
    (powercap.root / "intel-rapl:1" / "energy_uj").unlink()
    assert joules() is None
    powercap.set("intel-rapl:1", 200)
    assert joules() is None, "what passed in between is not known"


def test_a_machine_without_a_counter_or_with_one_package_too_few_has_no_rapl(powercap, tmp_path):
    assert Rapl.here(NOWHERE) is None
    (powercap.root / "intel-rapl:1" / "energy_uj").unlink()  # as where only root may read it
    assert Rapl.here(powercap.root) is None
    zero = tmp_path / "zero"
    zero.mkdir()
    Powercap(zero).zone("intel-rapl:0", "package-0", 1, most=0)
    assert Rapl.here(zero) is None


def test_a_readable_processor_is_measured(powercap):
    found = meter("cpu", WATTS, powercap=powercap.root)
    assert found.basis == "measured" and "measured" in found.how and "estimated" not in found.how
    joules = found.begin(1)
    powercap.set("intel-rapl:0", 7_000_000)
    assert joules() == 2.0


# -- NVML --------------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Millijoules of two GPUs behind a library of the same name."""
    counts = {"GPU-a": 1_000, "GPU-b": 50_000}

    def by_uuid(name: str) -> str:
        if name not in counts:
            raise NVMLError("Not Found")
        return name

    def energy(name: str) -> int:
        if counts[name] < 0:
            raise NVMLError("Not Supported")
        return counts[name]

    library: Any = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(counts),
        nvmlDeviceGetHandleByIndex=lambda index: list(counts)[index], nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return counts


def test_all_gpus_are_counted_beside_a_measured_processor(gpus, powercap):
    found = meter("cuda:0", WATTS, powercap=powercap.root)
    assert found.basis == "measured" and "2 GPUs by NVML" in found.how and "RAPL" in found.how
    joules = found.begin(1)
    gpus["GPU-a"] += 2_500
    gpus["GPU-b"] += 500
    powercap.set("intel-rapl:0", 6_000_000)
    assert joules() == pytest.approx(3.0 + 1.0)
    gpus["GPU-b"] = -1
    assert joules() is None


@pytest.mark.parametrize(("visible", "spent"), [("1", 0.5), ("GPU-a", 2.5), ("0, 1", 3.0)])
def test_only_the_visible_gpus_are_counted(gpus, powercap, monkeypatch, visible, spent):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    joules = meter("cuda", WATTS, powercap=powercap.root).begin(1)
    gpus["GPU-a"] += 2_500
    gpus["GPU-b"] += 500
    powercap.set("intel-rapl:0", 5_000_001)
    assert joules() == pytest.approx(spent, abs=1e-5)


def test_a_measured_gpu_beside_an_estimated_processor_is_an_estimate(gpus):
    found = meter("cuda:0", WATTS, powercap=NOWHERE)
    assert found.basis == "estimated" and "measured" not in found.how and "NVML" in found.how


def test_a_gpu_without_a_counter_is_refused(gpus, monkeypatch):
    gpus["GPU-b"] = -1
    with pytest.raises(EnvironmentError_, match="Not Supported") as refused:
        meter("cuda:0", WATTS, powercap=NOWHERE)
    assert "time-to-target" in refused.value.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EnvironmentError_, match="sees none"):
        meter("cuda:0", WATTS, powercap=NOWHERE)


def test_a_gpu_without_the_library_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingExtraError) as refused:
        meter("cuda:0", WATTS, powercap=NOWHERE)
    assert refused.value.remedy == "pip install 'upshift[energy]'"


def test_another_accelerator_is_refused(powercap):
    with pytest.raises(EnvironmentError_, match="mps"):
        meter("mps:0", WATTS, powercap=powercap.root)


# -- the estimate ------------------------------------------------------------------------------------------------------

#: Burns the CPU time it is told and prints what it used, its waited-for children included.
BURN = """
import os, sys, time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
{body}
spent = sum(os.times()[:4])
print(spent, flush=True)
sys.stdin.read()
"""


def burning(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BURN.format(body=body)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_cpu_time_of_a_child_and_of_children_it_has_waited_for():
    with burning("burn(0.4)\nif os.fork() == 0:\n    burn(0.3)\n    os._exit(0)\nos.wait()") as child:
        tree = Tree(child.pid)
        assert child.stdout is not None and child.stdin is not None
        said = float(child.stdout.readline())
        alive = tree.spent().cpu
        assert said > 0.6 and alive == pytest.approx(said, abs=0.05)
        child.stdin.close()
        deadline = time.monotonic() + 5
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tree.spent().cpu >= alive, "what is gone was spent all the same"


def test_a_process_whose_parent_ended_is_followed():
    orphan = "    if os.fork() == 0:\n        time.sleep(0.5); burn(0.3); time.sleep(9); os._exit(0)\n"
    with burning(f"if os.fork() == 0:\n{orphan}    time.sleep(0.4); os._exit(0)\nos.wait()") as child:
        tree = Tree(child.pid)
        time.sleep(0.2)
        tree.spent()
        assert child.stdout is not None and child.stdin is not None
        own = float(child.stdout.readline())
        deadline = time.monotonic() + 5
        while tree.spent().cpu < own + 0.25 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert tree.spent().cpu == pytest.approx(own + 0.3, abs=0.1)
        for pid in tree.pids:
            if pid != child.pid:
                os.kill(pid, signal.SIGKILL)
        child.stdin.close()


def test_a_family_that_ends_between_two_looks_is_counted_once():
    inner = "    if os.fork() == 0:\n        burn(0.4); os._exit(0)\n    os.wait(); os._exit(0)\n"
    with burning(f"if os.fork() == 0:\n{inner}os.wait()") as child:
        tree = Tree(child.pid)
        deadline = time.monotonic() + 5
        while len(tree.pids) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
            tree.spent()
        time.sleep(0.2)
        assert tree.spent().cpu > 0.0
        assert child.stdout is not None and child.stdin is not None
        said = float(child.stdout.readline())
        assert tree.spent().cpu == pytest.approx(said, abs=0.05)
        child.stdin.close()


def test_a_process_that_is_not_there_took_no_time():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Tree(gone.pid).spent().cpu == 0.0


def test_the_estimate_follows_cpu_time_and_wall_time():
    began = time.monotonic()
    with burning("burn(0.5)\ntime.sleep(0.3)") as child:
        found = meter("cpu", WATTS, powercap=NOWHERE)
        joules = found.begin(child.pid)
        assert child.stdout is not None and child.stdin is not None
        said = float(child.stdout.readline())
        spent = joules()
        wall = time.monotonic() - began
        (counter,) = found.counters
        assert isinstance(counter, Estimate)
        # 4 W more for each busy core, 1 W for each core whatever it does.
        assert spent == pytest.approx(4.0 * said + counter.cores * wall, abs=0.3 + 0.1 * counter.cores)
        child.stdin.close()
    assert found.basis == "estimated" and "measured" not in found.how
    assert "estimated from CPU time" in found.how and "ranks plans as these do" in found.how


def test_the_formula():
    assert Estimate(WATTS, 2).joules(seconds=10.0, cpu_seconds=3.0) == 2 * 1.0 * 10.0 + 4.0 * 3.0


# -- watts -------------------------------------------------------------------------------------------------------------


def test_stated_watts_have_a_source_and_a_date():
    found = stated()
    assert 0 < found.idle < found.busy < 20 and "Cloud Carbon Footprint" in found.source and found.date


def test_given_watts():
    assert parse("0.5:4") == Watts(0.5, 4.0, "as given by --watts")


@pytest.mark.parametrize("text", ["", "4", "4:0.5", "1:1", "-1:3", "a:b", "nan:3", "1:inf", "50:300"])
def test_watts_that_are_no_range_are_refused(text):
    with pytest.raises(UsageError, match="no range of watts") as refused:
        parse(text)
    assert "MIN:MAX" in refused.value.remedy
