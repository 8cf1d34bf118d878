"""The companion process: it sees the run, and the run never sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.records.resources import FILE, Alarm, GpuSample, Head, Sample, read
from upshift.records.runlog import RunLog
from upshift.sinks import beside, companion, threads
from upshift.sinks.beside import OFF, Spec, Started, born, start, stop
from upshift.sinks.companion import Companion, Lines, Watched, Windows, compact, next_period, thinned
from upshift.sinks.threads import Trackers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

#: Starts a companion as `upshift run` does, says its number, and becomes the training.
LAUNCH = """
import os, sys
from pathlib import Path
from upshift.sinks.beside import start
{before}
found = start(Path(sys.argv[1]), os.getpid(), period=0.1)
print(found.pid, flush=True)
if found.reason:
    print(found.reason, flush=True)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""

NO_CHILD = """
try:
    print(os.wait(), flush=True)
except ChildProcessError:
    print('no child', flush=True)
"""


def launch(folder: Path, script: str, *, before: str = "", **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(before=before), str(folder), "import os, sys, time\n" + script],
        env={name: value for name, value in os.environ.items() if name != OFF},
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found, "it never came to that"
    return found


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# -- one run, looked at from all sides ---------------------------------------------------------------------------------


class Seen(NamedTuple):
    folder: Path
    pid: int
    output: str
    spent: float
    companion: dict[str, Any]


SCRIPT = (
    NO_CHILD
    + """
end = time.process_time() + 0.3
while time.process_time() < end: pass
print(sum(os.times()[:4]), flush=True)
sys.stdin.readline()
"""
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("run")
    process = launch(folder, SCRIPT)
    number = int(line_of(process))
    output, spent = line_of(process), float(line_of(process))
    until(lambda: (folder / FILE).exists() and len(((found := read(folder)) and found.samples) or ()) > 1)
    other = psutil.Process(number)
    about = {
        "ppid": other.ppid(), "nice": other.nice(), "session": os.getsid(number), "group": os.getpgid(number),
        "files": sorted(os.readlink(f"/proc/{number}/fd/{fd}") for fd in os.listdir(f"/proc/{number}/fd")),
        "maps": Path(f"/proc/{number}/maps").read_text(), "memory": other.memory_info().rss,
    }  # fmt: skip
    process.communicate("\n")  # returns when the pipe of the training is closed by all that hold it
    until(lambda: gone(number))  # and it ends by itself
    return Seen(folder, process.pid, output, spent, about)


def test_a_script_that_waits_for_its_children_does_not_meet_it(seen):
    assert seen.output == "no child"


def test_it_stands_apart_from_the_family_and_gives_way(seen):
    about = seen.companion
    assert about["ppid"] not in (seen.pid, os.getpid())
    assert about["session"] != os.getsid(0) and about["group"] not in (seen.pid, os.getpgid(0))
    assert about["nice"] == min(os.nice(0) + 10, 19)


def test_it_holds_no_file_of_the_training(seen):
    own = {str(seen.folder / FILE), os.devnull}
    strangers = [name for name in seen.companion["files"] if name not in own and "pidfd" not in name]
    assert not strangers


def test_it_is_light(seen):
    assert "libtorch" not in seen.companion["maps"] and "numpy" not in seen.companion["maps"]
    assert seen.companion["memory"] < 80 * 2**20


def test_what_it_recorded(seen):
    found = read(seen.folder)
    assert found is not None and found.torn_lines == 0
    assert found.head.pid == seen.pid and found.head.period == 0.1 and found.head.cores
    assert found.overhead_seconds is not None and 0.0 < found.overhead_seconds < 5.0
    times = [sample.at for sample in found.samples]
    assert times == sorted(times) and times[0] > 0.0
    last = found.samples[-1]
    assert last.cpu_seconds == pytest.approx(seen.spent, abs=0.15), "exec and what came before start count apart"
    assert found.samples[0].memory and last.joules
    assert not (seen.folder / companion.LOG_FILE).exists(), "nothing went wrong"


# -- what may happen to it, or to the run ------------------------------------------------------------------------------


def test_a_run_whose_companion_is_killed_goes_on(tmp_path):
    with launch(tmp_path, "sys.stdin.readline(); print('done')") as process:
        number = int(line_of(process))
        until(lambda: (tmp_path / FILE).exists())
        os.kill(number, signal.SIGKILL)
        until(lambda: gone(number))
        output, _ = process.communicate("\n")
    assert output.strip() == "done" and process.returncode == 0
    found = read(tmp_path)
    assert found is not None and found.overhead_seconds is None


def test_ctrl_c_ends_the_training_only_and_the_companion_writes_the_rest(tmp_path):
    with launch(tmp_path, "print('on', flush=True); sys.stdin.readline()", start_new_session=True) as process:
        number = int(line_of(process))
        assert line_of(process) == "on"
        until(lambda: (tmp_path / FILE).exists())
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        until(lambda: gone(number))
    found = read(tmp_path)
    assert found is not None and found.overhead_seconds is not None


def test_a_full_disk_stops_the_record_and_nothing_else(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    with launch(tmp_path, "sys.stdin.readline(); print('done')", before=limit) as process:
        number = int(line_of(process))
        until(lambda: (tmp_path / FILE).exists() and (tmp_path / FILE).stat().st_size == 1000)
        assert not gone(number)
        output, _ = process.communicate("\n")
        until(lambda: gone(number))
    assert output.strip() == "done" and process.returncode == 0
    assert (tmp_path / FILE).stat().st_size == 1000
    found = read(tmp_path)
    assert found is not None and found.samples and found.torn_lines <= 1


def test_a_folder_that_is_removed_ends_it_quietly(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with launch(folder, "sys.stdin.readline(); print('done')") as process:
        number = int(line_of(process))
        until(lambda: (folder / FILE).exists())
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        until(lambda: gone(number))
        output, _ = process.communicate("\n")
    assert output.strip() == "done" and process.returncode == 0 and not folder.exists()


def test_it_ends_when_told_to_while_the_process_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv(OFF, raising=False)
    started = start(tmp_path, os.getpid(), period=0.1)
    assert started.pid is not None
    until(lambda: (tmp_path / FILE).exists())
    stop(started._replace(born=(started.born or 0.0) + 1.0))  # the number of somebody else by now
    assert not gone(started.pid)
    stop(started)
    until(lambda: gone(started.pid))
    found = read(tmp_path)
    assert found is not None and found.overhead_seconds is not None
    stop(started)


def test_where_orphans_come_to_the_training_there_is_no_companion(tmp_path):
    """As for the first process of a container: here by prctl(PR_SET_CHILD_SUBREAPER)."""
    adopt = "import ctypes; assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0"
    with launch(tmp_path, NO_CHILD, before=adopt) as process:
        assert line_of(process) == "None" and "--init" in line_of(process)
        assert line_of(process) == "no child"
    assert not (tmp_path / FILE).exists()


def test_it_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv(OFF, "1")
    assert start(tmp_path, os.getpid()) == Started(None) and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said_and_no_more(tmp_path, monkeypatch):
    monkeypatch.delenv(OFF, raising=False)
    found = start(tmp_path / "nowhere", os.getpid())
    assert found.pid is None and "not recorded" in found.reason


# -- parts of it -------------------------------------------------------------------------------------------------------


def test_a_number_that_now_belongs_to_somebody_else_is_not_watched():
    own = born(os.getpid())
    assert own is not None
    assert Watched(os.getpid(), own + 1.0).ended(5.0) and Watched(os.getpid(), None).ended(5.0)
    assert not Watched(os.getpid(), own).ended(0.01)


@pytest.mark.parametrize("handles", [True, False])
def test_an_end_is_seen_at_once_also_of_a_process_nobody_waits_for(handles, monkeypatch):
    if not handles:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    watched = Watched(child.pid, born(child.pid))
    assert not watched.ended(0.01)
    child.communicate("")
    assert watched.ended(20.0) and born(child.pid) is None


@given(st.floats(0.05, 60.0), st.floats(0.0, 1e7), st.floats(0.0, 10.0))
def test_looks_get_rarer_with_age_and_cost(base, elapsed, cost):
    period = next_period(base, elapsed, cost)
    assert period >= base and cost <= companion.SHARE * period * 1.0001
    assert period <= max(base, companion.RAREST, cost / companion.SHARE)
    assert next_period(base, elapsed + 100.0, cost) >= period


@given(st.integers(0, 700))
def test_thinning_keeps_the_ends_and_the_order(n):
    kept: list[Sample] = []
    for at in range(n):
        kept = thinned([*kept, Sample(at=float(at))], 100)
        assert len(kept) <= 100 and kept[-1].at == at and kept[0].at == 0.0
    assert kept == sorted(kept, key=lambda sample: sample.at)


RECORDS = st.builds(
    Sample,
    at=st.floats(0.0, 1e6),
    memory=st.none() | st.floats(0.0, 1e13),
    threads=st.none() | st.integers(0, 10**6),
    gpus=st.lists(st.builds(GpuSample, name=st.text(max_size=5), watts=st.none() | st.floats(0.0, 1e4),
                            throttled=st.lists(st.text(max_size=5), max_size=2).map(tuple)), max_size=2).map(tuple),
)  # fmt: skip


@given(RECORDS)
def test_a_compact_line_reads_back_as_the_same_sample(sample):
    found = msgspec.convert(msgspec.json.decode(msgspec.json.encode(compact(sample))), Sample)
    assert found.at == pytest.approx(sample.at, abs=1e-4, rel=1e-6) and found.threads == sample.threads
    assert (found.memory is None) == (sample.memory is None)
    assert (found.memory or 0.0) == pytest.approx(sample.memory or 0.0, rel=1e-6, abs=1.0)
    assert [gpu.throttled for gpu in found.gpus] == [gpu.throttled for gpu in sample.gpus]


def test_a_disk_with_room_again_is_written_to_again(tmp_path, monkeypatch):
    lines = Lines(tmp_path / FILE)
    lines.write("head", compact(Head(pid=7)))
    real, full = os.write, [True]

    def write(fd: int, data: bytes) -> int:
        if full[0]:
            full[0] = False
            return real(fd, data[:10])
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    lines.write("sample", {"at": 1.0})
    lines.write("sample", {"at": 2.0})
    found = read(tmp_path)
    assert found is not None and [sample.at for sample in found.samples] == [2.0] and found.torn_lines == 1


def test_windows_are_those_of_the_last_start_of_the_log(tmp_path):
    windows = Windows(tmp_path)
    assert windows.read() == []
    log = RunLog(tmp_path / "rank0")
    log.append("start", script="a", arguments=[], started="now")
    log.append("steps", first=0, n=5, at=1.0, seconds=1.0, phases={"data": 0.5})
    log.append("steps", nonsense=True)
    assert [window.n for window in windows.read()] == [5]
    log.append("start", script="a", arguments=[], started="later")
    log.append("steps", first=5, n=7, at=1.0, seconds=1.0)
    assert [window.n for window in windows.read()] == [7]
    log.close()


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_an_alarm_is_written_once_and_a_look_that_fails_is_survived(tmp_path, monkeypatch, own_signals):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.6)"])
    calls = []

    def alarms(samples: Any, head: Head, windows: Any) -> list[Alarm]:
        calls.append(len(samples))
        if len(calls) == 2:
            raise RuntimeError("odd samples")
        return [Alarm(at=samples[-1].at, name="swapping", text="the machine swaps")]

    monkeypatch.setattr("upshift.diagnose.alarms.alarms", alarms)
    monkeypatch.setattr(companion, "ALARM_EVERY", 0.0)
    monkeypatch.setattr(companion, "SHARE", 1.0)
    spec = Spec(pid=child.pid, born=born(child.pid), folder=str(tmp_path), began=time.monotonic(), period=0.05)
    Companion(spec).watch()
    child.wait()
    found = read(tmp_path)
    assert found is not None and [alarm.name for alarm in found.alarms] == ["swapping"] and len(calls) > 2
    assert "odd samples" in (tmp_path / companion.LOG_FILE).read_text()


def test_steps_slower_than_the_plan_s_are_an_alarm(tmp_path, monkeypatch, own_signals):
    log = RunLog(tmp_path)
    log.append("start", script="a", arguments=[], started="now")
    for number in range(80):
        log.append("steps", first=50 * number, n=50, at=float(number), seconds=1.0)
    log.close()
    monkeypatch.setattr(companion, "ALARM_EVERY", 0.0)
    monkeypatch.setattr(companion, "SHARE", 1.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.4)"])
    pace = {"seconds": 0.01, "low": 0.01, "high": 0.011, "stretches": 8}
    spec = Spec(child.pid, born(child.pid), str(tmp_path), time.monotonic(), period=0.05, pace=pace)
    Companion(msgspec.json.decode(msgspec.json.encode(spec), type=Spec)).watch()
    child.wait()
    found = read(tmp_path)
    assert found is not None
    (alarm,) = [alarm for alarm in found.alarms if alarm.name == "slower_than_planned"]
    assert "steps take 2.00x" in alarm.text and "(10 ms then, 20 ms now, measured)" in alarm.text


def test_a_spec_that_cannot_be_read_is_an_error_with_a_remedy(tmp_path):
    from upshift.errors import RecordError

    for arguments in ([], [str(tmp_path / "none")]):
        with pytest.raises(RecordError):
            beside.main(arguments)


# -- trackers ----------------------------------------------------------------------------------------------------------


class Sink:
    opened = True

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.act, self.polls, self.closed, self.after_close = act, 0, False, 0

    def poll(self) -> None:
        self.polls += 1
        self.after_close += self.closed
        self.act()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sink]:
    made: dict[str, Sink] = {}
    module = SimpleNamespace(open_sinks=lambda specs, folder: [made[spec] for spec in specs])
    monkeypatch.setitem(sys.modules, "upshift.sinks.trackers", module)  # type: ignore[arg-type]
    monkeypatch.setattr(threads, "EVERY", 0.01)
    monkeypatch.setattr(threads, "PATIENCE", 0.2)
    monkeypatch.setattr(threads, "FIRST_PATIENCE", 0.2)
    return made


def test_each_tracker_is_polled_a_last_time_and_closed(sinks, tmp_path):
    sinks["a"], sinks["b"] = Sink(), Sink()
    said: list[str] = []
    trackers = Trackers(["a", "b"], tmp_path, said.append)
    until(lambda: min(sinks["a"].polls, sinks["b"].polls) > 2)
    before = sinks["a"].polls
    trackers.close()
    assert not said and all(sink.closed and not sink.after_close for sink in sinks.values())
    assert sinks["a"].polls > before


def test_one_that_raises_or_ends_the_process_is_dropped_alone(sinks, tmp_path):
    def fail() -> None:
        raise ConnectionError("no server")

    sinks["wandb:secret@host"], sinks["exits"], sinks["good"] = Sink(fail), Sink(lambda: sys.exit(3)), Sink()
    said: list[str] = []
    trackers = Trackers(list(sinks) + ["unknown"], tmp_path, said.append)
    until(lambda: len(said) == 3 and sinks["good"].polls > 2)
    trackers.close()
    assert sinks["good"].closed and sinks["exits"].polls == 1
    assert any("wandb is dropped" in text and "no server" in text for text in said)
    assert not any("secret" in text for text in said)


def test_one_that_hangs_is_dropped_and_holds_nobody_up(sinks, tmp_path):
    freed = threading.Event()
    sinks["stuck"], sinks["good"] = Sink(lambda: freed.wait(20.0) and None), Sink()
    said: list[str] = []
    trackers = Trackers(list(sinks), tmp_path, said.append)

    def dropped() -> bool:
        trackers.check()
        return bool(said)

    until(dropped)
    polls = sinks["good"].polls
    until(lambda: sinks["good"].polls > polls)
    trackers.close()
    assert sinks["good"].closed and not sinks["stuck"].closed and len(said) == 1 and "did not answer" in said[0]
    freed.set()


def test_a_tracker_that_hangs_at_the_end_is_left_behind(sinks, tmp_path):
    freed, hang = threading.Event(), [False]
    sinks["late"] = Sink(lambda: (freed.wait(20.0) and None) if hang[0] else None)
    said: list[str] = []
    trackers = Trackers(["late"], tmp_path, said.append)
    until(lambda: sinks["late"].polls > 1)
    hang[0] = True
    trackers.close()
    assert len(said) == 1 and "was not done" in said[0]
    freed.set()


def test_a_tracker_that_still_opens_when_the_run_ends_may_open_and_write(sinks, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "FIRST_PATIENCE", 10.0)
    begun, free = threading.Event(), threading.Event()

    def opens() -> None:
        begun.set()
        free.wait(20.0)
        sink.opened = True

    sink = sinks["slow"] = Sink(opens)
    sink.opened = False
    said: list[str] = []
    trackers = Trackers(["slow"], tmp_path, said.append)
    assert begun.wait(10.0)
    closing = threading.Thread(target=trackers.close)
    closing.start()
    # Longer than any other call may take.
    closing.join(3 * threads.PATIENCE)
    assert closing.is_alive() and not said
    free.set()
    closing.join(10.0)
    assert sink.closed and sink.polls == 2 and not said


def test_a_tracker_that_never_opens_is_left_behind_after_its_patience(sinks, tmp_path):
    freed = threading.Event()
    sinks["never"] = Sink(lambda: freed.wait(20.0) and None)
    sinks["never"].opened = False
    said: list[str] = []
    trackers = Trackers(["never"], tmp_path, said.append)
    until(lambda: sinks["never"].polls == 1)
    trackers.close()
    assert len(said) == 1 and "was not open" in said[0] and not sinks["never"].closed
    freed.set()
