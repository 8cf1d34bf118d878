"""Resources of a process tree and its machine: real processes with known use, recorded /proc and /sys, made-up GPUs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.hardware.watts import Watts
from upshift.measure import gpus as gpus_module
from upshift.measure import resources
from upshift.measure.cgroups import Group
from upshift.measure.gpus import REASONS, here
from upshift.measure.resources import Looker
from upshift.measure.sensors import Clock, Thermometer
from upshift.measure.tree import Sums, Tree, _Member
from upshift.records.resources import Head, PowerLimit
from upshift.sinks.companion import compact

MIB = 2**20
WATTS = Watts(1.0, 5.0, "made up")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@contextmanager
def talking(code: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """A Python child that goes on at each line it is sent, and answers each with a line."""
    prelude = "import os, sys, time, mmap\ndef answer(text=''):\n print(text, flush=True)\n sys.stdin.readline()\n"
    child = subprocess.Popen(
        [sys.executable, "-c", prelude + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def go_on(text: str = "") -> str:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(text + "\n")
        child.stdin.flush()
        return child.stdout.readline().strip()

    try:
        assert child.stdout is not None
        yield child, go_on
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()


def first_answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


# -- trees of processes ------------------------------------------------------------------------------------------------

BURN = """
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
answer()
burn(0.15)
if os.fork() == 0:
    burn(0.15); os._exit(0)
os.wait()
answer(sum(os.times()[:4]))
"""


@pytest.mark.parametrize("proc", ["plain", "by psutil"])
def test_cpu_time_of_a_child_and_of_one_it_has_waited_for(proc, tmp_path):
    with talking(BURN) as (child, go_on):
        first_answer(child)
        tree = Tree(child.pid, Path("/") if proc == "plain" else tmp_path)
        before = tree.look().sums.cpu
        said = float(go_on())
        look = tree.look()
        assert said > 0.28 and look.sums.cpu == pytest.approx(said, abs=0.04)
        assert before < said - 0.2 and look.processes == 1 and look.threads == 1 and look.pids == (child.pid,)
        child.kill()
        child.wait()
        after = tree.look()
        assert after.processes == 0 and after.memory is None and after.sums.cpu >= look.sums.cpu


WRITE = """
def write(name, mib):
    with open(sys.argv[1] if len(sys.argv) > 1 else name, 'wb') as file:
        file.write(os.urandom(mib << 20)); file.flush(); os.fsync(file.fileno())
folder = sys.stdin.readline().strip()
write(os.path.join(folder, 'a'), 4)
if os.fork() == 0:
    write(os.path.join(folder, 'b'), 2); os._exit(0)
os.wait()
answer(next(line.split()[1] for line in open('/proc/self/io') if line.startswith('write_bytes')))
"""


@linux
def test_bytes_written_stay_after_the_writer_has_ended(tmp_path):
    with talking(WRITE) as (child, go_on):
        tree = Tree(child.pid)
        told = float(go_on(str(tmp_path)))
        look = tree.look()
        assert look.sums.written == told, "the kernel's own sum, the ended child's part included"
        if told:  # some filesystems count nothing
            assert told >= 6 * MIB
        child.kill()
        child.wait()
        assert tree.look().sums.written == told


SHARE = """
answer()
held = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for place in range(0, len(held), 4096): held[place] = 1
answer()
ready, told = os.pipe()
if os.fork() == 0:
    os.write(told, b'x'); time.sleep(60); os._exit(0)
os.read(ready, 1)
answer(os.getpid())
"""


@linux
def test_memory_that_processes_share_counts_once():
    with talking(SHARE) as (child, go_on):
        first_answer(child)
        tree = Tree(child.pid)
        before = tree.look().memory
        assert before is not None and tree.proportional
        go_on()
        grown = tree.look().memory
        assert grown is not None and grown - before == pytest.approx(48 * MIB, rel=0.1), "seen between two readings"
        go_on()
        deadline, memory, processes = time.monotonic() + 5, 0.0, 0
        while time.monotonic() < deadline and not (processes == 2 and memory < before + 60 * MIB):
            look = tree.look()
            memory, processes = look.memory or 0.0, look.processes
            time.sleep(0.02)
        assert processes == 2 and before + 44 * MIB < memory < before + 60 * MIB


@linux
def test_a_process_that_is_not_there_is_an_empty_tree():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Tree(gone.pid).look() == (Sums(0.0, None, None), None, 0, 0, ())


class Kernel:
    """Processes that spend, fork, end and are waited for, with the books a kernel keeps."""

    def __init__(self) -> None:
        self.members = {1: _Member(began=1.0, parent=0, cpu=0.0, threads=1, resident=0.0, shared=0.0)}
        self.spent = 0.0
        self.numbers = itertools.count(2)

    def act(self, what: str, which: int, seconds: int) -> None:
        pid = sorted(self.members)[which % len(self.members)]
        if what == "spend":
            self.members[pid].cpu += seconds
            self.spent += seconds
        elif what == "fork":
            new = next(self.numbers)
            self.members[new] = _Member(began=float(new), parent=pid, cpu=0.0, threads=1, resident=0.0, shared=0.0)
        elif pid != 1:
            ended = self.members.pop(pid)
            for member in self.members.values():
                if member.parent == pid:
                    member.parent = 0  # adopted by somebody outside
            if ended.parent in self.members:
                self.members[ended.parent].cpu += ended.cpu


class Simulated(Tree):
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        super().__init__(1, Path("/nonexistent"))

    def _process(self, pid: int) -> _Member | None:
        found = self.kernel.members.get(pid)
        return None if found is None else _Member(found.began, found.parent, found.cpu, 1, 0.0, 0.0)

    def _children(self, pid: int) -> list[int]:
        return [child for child, member in self.kernel.members.items() if member.parent == pid]


ACTS = st.lists(st.tuples(st.sampled_from(["spend", "fork", "end"]), st.integers(0, 9), st.integers(1, 5)), max_size=40)


@given(ACTS)
def test_with_a_look_after_every_event_nothing_is_lost_or_counted_twice(acts):
    kernel = Kernel()
    tree = Simulated(kernel)
    for act in acts:
        kernel.act(*act)
        assert tree.look().sums.cpu == kernel.spent


@given(ACTS, st.integers(2, 7))
def test_rare_looks_never_see_more_than_was_spent_and_sums_never_fall(acts, every):
    kernel = Kernel()
    tree = Simulated(kernel)
    before = 0.0
    for number, act in enumerate(acts):
        kernel.act(*act)
        if number % every == 0:
            now = tree.look().sums.cpu
            assert before <= now <= kernel.spent
            before = now


# -- recorded machines -------------------------------------------------------------------------------------------------


class Recorded:
    """A root with files in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, **files: str) -> Recorded:
        for name, text in files.items():
            self[name.replace("__", "/")] = text
        return self

    def __setitem__(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def version_2(recorded: Recorded) -> None:
    recorded["proc/self/cgroup"] = "0::/job\n"
    recorded["sys/fs/cgroup/job/memory.max"] = "1000000\n"
    recorded["sys/fs/cgroup/job/memory.current"] = "700000\n"
    recorded["sys/fs/cgroup/job/memory.stat"] = "anon 400000\ninactive_file 200000\nactive_file 50000\nshmem 50000\n"
    recorded["sys/fs/cgroup/job/cpu.max"] = "150000 100000\n"
    recorded["sys/fs/cgroup/job/cpu.stat"] = "usage_usec 5000000\nnr_throttled 3\nthrottled_usec 2500000\n"


def version_1(recorded: Recorded) -> None:
    recorded["proc/self/cgroup"] = "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"
    recorded["sys/fs/cgroup/memory/memory.limit_in_bytes"] = f"{2**63 - 4096}\n"
    recorded["sys/fs/cgroup/memory/memory.usage_in_bytes"] = "900000000\n"
    recorded["sys/fs/cgroup/memory/job/memory.limit_in_bytes"] = "1000000\n"
    recorded["sys/fs/cgroup/memory/job/memory.usage_in_bytes"] = "700000\n"
    recorded["sys/fs/cgroup/memory/job/memory.stat"] = "total_inactive_file 200000\ntotal_active_file 50000\n"
    for folder in ("cpu,cpuacct/job", "cpuacct/job"):
        recorded[f"sys/fs/cgroup/{folder}/cpuacct.usage"] = "5000000000\n"
    recorded["sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us"] = "150000\n"
    recorded["sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us"] = "100000\n"
    recorded["sys/fs/cgroup/cpu,cpuacct/job/cpu.stat"] = "nr_periods 9\nthrottled_time 2500000000\n"


@pytest.mark.parametrize("version", [version_1, version_2])
def test_limits_of_a_container(recorded, version):
    version(recorded)
    group = Group(recorded.root)
    assert group.memory_room() == 1000000 - 700000 + 250000, "pages of files are given back"
    assert group.quota == 1.5 and group.throttled() == 2.5 and group.cpu_seconds() == 5.0


def test_no_group_has_no_limits(recorded):
    group = Group(recorded.root)
    assert (group.memory_room(), group.quota, group.throttled(), group.cpu_seconds()) == (None, None, None, None)


@pytest.mark.parametrize("text", ["", "max\n", "many\n", "-5\n"])
def test_a_limit_that_is_no_number_is_none(recorded, text):
    version_2(recorded)
    group = Group(recorded.root)
    recorded["sys/fs/cgroup/job/memory.max"] = text
    recorded["sys/fs/cgroup/job/cpu.stat"] = "throttled_usec\nusage_usec x\n\n"
    assert group.memory_room() is None and group.throttled() is None and group.cpu_seconds() is None


def test_temperature_is_that_of_the_hottest_package(recorded):
    for number, (name, heat) in enumerate([("nvme", "90000"), ("coretemp", "55000"), ("coretemp", "61500")]):
        recorded[f"sys/class/hwmon/hwmon{number}/name"] = f"{name}\n"
        recorded[f"sys/class/hwmon/hwmon{number}/temp1_input"] = f"{heat}\n"
    recorded["sys/class/thermal/thermal_zone0/type"] = "x86_pkg_temp\n"
    recorded["sys/class/thermal/thermal_zone0/temp"] = "99000\n"
    found = Thermometer(recorded.root)
    assert found.celsius() == 61.5
    recorded["sys/class/hwmon/hwmon1/temp1_input"] = "-273000\n"
    recorded["sys/class/hwmon/hwmon2/temp1_input"] = "broken\n"
    assert found.celsius() is None


def test_a_thermal_zone_serves_where_no_sensor_is_shown(recorded):
    recorded["sys/class/thermal/thermal_zone0/type"] = "battery\n"
    recorded["sys/class/thermal/thermal_zone0/temp"] = "30000\n"
    assert Thermometer(recorded.root).celsius() is None
    recorded["sys/class/thermal/thermal_zone1/type"] = "cpu-thermal\n"
    recorded["sys/class/thermal/thermal_zone1/temp"] = "47000\n"
    assert Thermometer(recorded.root).celsius() == 47.0


def test_clock_of_the_cores_that_may_be_used(recorded):
    for core, now in enumerate([3_000_000, 1_000_000, 2_000_000, 9_000_000]):
        recorded[f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"] = f"{now}\n"
        recorded[f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq"] = "4000000\n"
    clock = Clock([0, 1, 2], 3.0, recorded.root)
    assert clock.hertz() == 2e9 and clock.most() == 4e9
    assert Clock([0, 1, 2], 1.0, recorded.root).hertz() == 3e9, "a quota lets the others sleep"
    assert Clock([7], 1.0, recorded.root).hertz() is None


def machine_files(recorded: Recorded) -> None:
    recorded["proc/stat"] = "cpu  9 9 9 9\n" + "".join(f"cpu{n} 100 20 30 9999 7 4 6 5 0 0\n" for n in range(512))
    recorded["proc/meminfo"] = "MemTotal: 4000 kB\nMemAvailable:    2048 kB\n"
    recorded["proc/vmstat"] = "pswpin 3\npswpout 4\npgpgin 9\n"
    recorded["proc/loadavg"] = "2.50 1.00 0.50 3/200 999\n"
    recorded["proc/net/dev"] = (
        "Inter-|\n face |bytes\n    lo: 5 0 0 0 0 0 0 0 5 0 0\n  eth0: 100 0 0 0 0 0 0 0 40 0 0\n"
        "docker0:99 0 0 0 0 0 0 0 99 0 0\n"
    )
    recorded["sys/class/net/eth0/device/uevent"] = ""


def test_the_machine_is_read_from_its_files(recorded, monkeypatch):
    monkeypatch.setattr(resources, "usable_cpus", lambda: [0, 1])
    machine_files(recorded)
    (recorded.root / "dev/shm").mkdir(parents=True)
    looker = Looker(os.getpid(), recorded.root, root=recorded.root)
    recorded["proc/stat"] = "".join(f"cpu{n} {150 if n < 2 else 900} 20 30 0 0 4 6 5 0 0\n" for n in range(9))
    recorded["proc/vmstat"] = "pswpin 5\npswpout 6\n"
    recorded["proc/net/dev"] = "a\nb\n eth0: 150 0 0 0 0 0 0 0 70 0 0\n lo: 9 0 0 0 0 0 0 0 9 0 0\n"
    sample, ticks = looker.look(), os.sysconf("SC_CLK_TCK")
    assert sample.machine_cpu_seconds == pytest.approx(100 / ticks), "of the two cores that may be used"
    assert sample.memory_available == 2048 * 1024
    assert sample.swapped == 4 * os.sysconf("SC_PAGE_SIZE")
    assert (sample.received, sample.sent, sample.load) == (50, 30, 2.5), "the bridge shows the card's bytes again"
    assert sample.shm is not None and sample.throttled is None and sample.temperature is None
    assert "temperature of the processor" in looker.head().notes[-1]


def test_a_containers_share_is_what_counts(recorded, monkeypatch):
    monkeypatch.setattr(resources, "usable_cpus", lambda: list(range(64)))
    machine_files(recorded)
    version_2(recorded)
    looker = Looker(os.getpid(), recorded.root, root=recorded.root)
    recorded["sys/fs/cgroup/job/cpu.stat"] = "usage_usec 6000000\nthrottled_usec 3000000\n"
    sample, head = looker.look(), looker.head()
    assert head.cores == 1.5 and head.memory_limit == 1000000
    assert sample.machine_cpu_seconds == 1.0 and sample.throttled == 0.5
    assert sample.memory_available == 550000


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["stat", "meminfo", "vmstat", "loadavg", "net/dev"]), st.text(max_size=60)))
def test_files_that_hold_anything_tell_nothing_and_stop_nothing(tmp_path_factory, files):
    recorded = Recorded(tmp_path_factory.mktemp("root"))
    machine_files(recorded)
    for name, text in files.items():
        (recorded.root / "proc" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    sample = Looker(os.getpid(), Path("/nonexistent"), root=recorded.root).look()
    assert sample.cpu_seconds is not None and sample.disk_free is None
    if "loadavg" not in files:
        assert sample.load == 2.5


# -- a looker ----------------------------------------------------------------------------------------------------------


def test_a_run_by_its_own_books(tmp_path):
    with talking(BURN) as (child, go_on):
        first_answer(child)
        spent = Tree(child.pid).look().sums
        began = time.monotonic()
        looker = Looker(child.pid, tmp_path, spent=spent, watts=WATTS)
        first = looker.look()
        said = float(go_on())
        second = looker.look()
        wall = time.monotonic() - began
        assert first.cpu_seconds == pytest.approx(0.0, abs=0.02)
        assert second.cpu_seconds == pytest.approx(said - spent.cpu, abs=0.04)
        assert second.machine_cpu_seconds is None or second.machine_cpu_seconds >= second.cpu_seconds - 0.05
        head = looker.head()
        assert head.energy_basis == "estimated" or "RAPL" in head.energy
        if head.energy_basis == "estimated":
            cores = -(-int(head.cores or 1) // 1)
            assert second.joules == pytest.approx(cores * 1.0 * wall + 4.0 * second.cpu_seconds, abs=0.1 + 0.1 * cores)
            assert second.watts == pytest.approx((second.joules - first.joules) / (second.at - first.at))
        child.kill()
        child.wait()
        last = looker.look()
        assert last.cpu_seconds >= second.cpu_seconds and last.memory is None and last.processes == 0


def test_a_processor_with_a_counter_is_measured_and_one_that_stands_still_is_estimated(recorded, monkeypatch):
    zone = "sys/class/powercap/intel-rapl:0"
    recorded[f"{zone}/name"] = "package-0\n"
    recorded[f"{zone}/energy_uj"] = "5000000\n"
    recorded[f"{zone}/max_energy_range_uj"] = "1000000000\n"
    looker = Looker(os.getpid(), recorded.root, root=recorded.root)
    assert looker.look().joules is None and looker.head().energy_basis == "measured"
    recorded[f"{zone}/energy_uj"] = "8000000\n"
    assert looker.look().joules == 3.0
    monkeypatch.setattr(resources, "STANDS_STILL", -1.0)
    assert looker.look().joules == 3.0, "it has moved once"
    still = Looker(os.getpid(), recorded.root, root=recorded.root, watts=WATTS)
    assert still.look().joules is not None
    assert still.head().energy_basis == "estimated" and "made up" in still.head().energy


# -- accelerators ------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class Library:
    """NVML with two GPUs; from call number `fails_at` on, every call raises."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        self.calls = 0
        self.fails_at: int | None = None
        self.text = "GPU is lost"
        self.millijoules = {"a": 1_000, "b": 2_000}
        self.used = {"a": 500 * MIB, "b": 10 * MIB}
        self.processes: dict[str, list[int]] = {"a": [], "b": []}
        self.reasons = 0
        self.energy_counted = True

    def _count(self) -> None:
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise NVMLError(self.text)

    def nvmlInit(self) -> None:
        self._count()

    def nvmlDeviceGetCount(self) -> int:
        self._count()
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._count()
        if index > 1:
            raise NVMLError("Invalid Argument")
        return "ab"[index]

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self._count()
        if name not in ("GPU-a", "GPU-b"):
            raise NVMLError("Not Found")
        return name[-1]

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        self._count()
        return b"Test 9000"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._count()
        return SimpleNamespace(gpu=37, memory=5)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._count()
        return SimpleNamespace(used=self.used[handle], total=8 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._count()
        return 250_000

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        self._count()
        return 450_000

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: str) -> int:
        self._count()
        return 700_000

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: str) -> list[int]:
        self._count()
        if handle == "a":
            raise NVMLError("Not Supported")
        return [200_000, 700_000]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._count()
        if not self.energy_counted:
            raise NVMLError("Not Supported")
        return self.millijoules[handle]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._count()
        return 71

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        self._count()
        return 1200

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        self._count()
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._count()
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._count()
        return [SimpleNamespace(pid=pid) for pid in self.processes[handle]]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "pynvml", made)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "amdsmi", None)  # type: ignore[arg-type]
    return made


def test_a_gpu_that_the_run_is_seen_on(library):
    found, notes = here(None)
    assert found is not None and not notes and found.seen == 2
    assert found.look([4242], 0.0) == (), "memory that others held before is not this run's"
    library.processes["b"] = [4242]
    library.used["b"] += 300 * MIB
    library.reasons = 0x1 | 0x20
    (sample,) = found.look([77, 4242], 1.0)
    library.millijoules["b"] += 5_500
    (sample,) = found.look([77, 4242], 2.0)
    assert sample.name == "Test 9000 (1)" and sample.utilisation == 0.37
    assert sample.memory == 310 * MIB and sample.memory_total == 8 * 2**30
    assert (sample.watts, sample.joules, sample.temperature) == (250.0, 5.5, 71.0)
    assert (sample.clock, sample.clock_most) == (1.2e9, 1.98e9)
    assert sample.throttled == (REASONS[0x20],)
    assert found.basis == "measured" and found.what.startswith("1 GPU by NVML")


def test_power_limits_are_those_of_the_gpus_that_are_used(library, tmp_path):
    library.processes["b"] = [os.getpid()]
    looker = Looker(os.getpid(), tmp_path, visible="0,1")
    assert looker.head().power_limits == ()
    looker.look()
    assert looker.head().power_limits == (PowerLimit("Test 9000 (1)", 450.0, 700.0, 200.0, 700.0),)
    library.processes["a"] = [os.getpid()]
    library.used["a"] += 300 * MIB
    looker.look()
    head = looker.head()
    assert head.power_limits[1] == PowerLimit("Test 9000 (0)", 450.0, 700.0)
    assert not any("NVML" in note for note in head.notes)
    assert msgspec.convert(compact(head), Head).power_limits == head.power_limits


def test_a_gpu_whose_processes_cannot_be_named_is_used_once_its_memory_fills(library, tmp_path):
    found, _ = here(None, tmp_path)
    assert found is not None and found.look([5], 0.0) == ()
    library.used["a"] += 90 * MIB
    assert found.look([5], 1.0) == ()
    library.used["a"] += 90 * MIB
    library.processes["a"] = [999_999]  # of another namespace: no such process is seen from here
    assert len(found.look([5], 2.0)) == 1
    (tmp_path / "31").mkdir()
    library.used["b"] += 900 * MIB
    library.processes["b"] = [31]
    assert len(found.look([5], 3.0)) == 1, "somebody else's, who can be seen"


def test_without_a_counter_power_is_summed_and_called_an_estimate(library):
    library.energy_counted = False
    library.processes["a"] = [5]
    found, _ = here("GPU-a")
    assert found is not None
    found.look([5], 10.0)
    found.look([5], 11.0)
    (sample,) = found.look([5], 14.0)
    assert sample.joules == 4.0 * 250.0 and found.basis == "estimated" and not found.notes


@pytest.mark.parametrize(
    ("visible", "seen"), [("", 0), ("-1", 0), ("1", 1), ("0, 1", 2), ("GPU-b", 1), ("1,7,0", 1), ("GPU-zzz,0", 0)]
)
def test_only_visible_gpus_are_looked_at(library, visible, seen):
    found, _ = here(visible)
    assert (found.seen if found else 0) == seen


@pytest.mark.parametrize("fails_at", range(1, 60))
def test_nvml_that_breaks_at_any_call_costs_its_figures_and_one_note(library, tmp_path, fails_at):
    library.fails_at = fails_at
    library.processes["a"] = [os.getpid()]
    looker = Looker(os.getpid(), tmp_path, visible="0,1")
    samples = [looker.look() for _ in range(3)]
    head = looker.head()
    assert all(sample.cpu_seconds is not None and sample.memory for sample in samples)
    told = [note for note in head.notes if "GPU is lost" in note]
    assert len(told) == (1 if library.calls >= fails_at else 0)
    if samples[-1].gpus and samples[-1].gpus[0].joules is None:
        assert samples[-1].joules is None, "the sum of the others is not the energy of the run"


def test_nvml_without_a_driver_is_a_machine_without_a_gpu(library):
    library.fails_at, library.text = 1, "NVML Shared Library Not Found"
    assert here(None) == (None, [])


def test_nvml_that_comes_back_goes_on_counting(library, tmp_path):
    library.processes["a"] = [os.getpid()]
    looker = Looker(os.getpid(), tmp_path, visible="0", watts=WATTS)
    first = looker.look()
    library.fails_at = 0
    assert looker.look().gpus[0].watts is None
    library.fails_at = None
    library.millijoules["a"] += 9_000
    last = looker.look()
    assert last.gpus[0].joules == 9.0 and last.joules is not None and first.joules is not None
    assert last.joules >= first.joules + 9.0 and "GPU by NVML" in looker.head().energy


def test_amd_figures_come_in_the_same_units(monkeypatch):
    kinds = SimpleNamespace(HOTSPOT=1, GFX=1, CURRENT=1)
    library = SimpleNamespace(
        amdsmi_init=lambda: None, amdsmi_get_processor_handles=lambda: ["h"],
        amdsmi_get_gpu_asic_info=lambda h: {"market_name": "MI300X"},
        amdsmi_get_gpu_activity=lambda h: {"gfx_activity": 50},
        amdsmi_get_gpu_vram_usage=lambda h: {"vram_used": 1024, "vram_total": 4096},
        amdsmi_get_power_info=lambda h: {"current_socket_power": "N/A", "average_socket_power": 300},
        amdsmi_get_energy_count=lambda h: {"energy_accumulator": 2_000_000, "counter_resolution": 15.3},
        amdsmi_get_temp_metric=lambda h, kind, metric: 60, AmdSmiTemperatureType=kinds,
        AmdSmiTemperatureMetric=kinds, AmdSmiClkType=kinds,
        amdsmi_get_clock_info=lambda h, kind: {"clk": 1500, "max_clk": 2100},
        amdsmi_get_gpu_process_list=lambda h: [{"pid": 5}, "N/A"],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "amdsmi", library)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ROCR_VISIBLE_DEVICES", raising=False)
    found, notes = here(None)
    assert found is not None and not notes
    (sample,) = found.look([5], 0.0)
    assert (sample.utilisation, sample.memory, sample.watts) == (0.5, 2.0**30, 300.0)
    assert (sample.joules, sample.clock, sample.clock_most, sample.temperature) == (0.0, 1.5e9, 2.1e9, 60.0)
    assert gpus_module.Amd.label in found.what
