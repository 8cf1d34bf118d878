"""A rank that is killed, frozen or stuck, and a launcher that dies: nobody waits for ever, and it is said who."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.run
from conftest import often
from ranked import CONTEXT, WIDTH, Started, build

from upshift.engine.group import LOST, Group
from upshift.engine.watch import BEAT

#: Seconds within which everybody is out once a rank or the launcher is gone.
OUT = 5.0

#: Seconds in one collective, in these tests.
TIMEOUT = 2.0


def _stuck_in_python() -> None:
    time.sleep(120)


def _stuck_in_native_code() -> None:
    # PyDLL keeps the interpreter's lock, so no thread of this process can answer.
    empty, _ = os.pipe()
    ctypes.PyDLL(None).read(empty, ctypes.create_string_buffer(1), 1)


def _out_of_memory_in_fsdp2(group: Any) -> None:
    """Rank 1 runs out of memory where rank 0 already waits for it."""
    module = group.wrap(build(), "fsdp2")
    with group.no_sync(last=True):
        if group.rank == 1:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        module(torch.ones(2, WIDTH, dtype=torch.float64)).mean().backward()


def _part(folder: str, first: str, second: str, timeout: float) -> Any:
    """Three steps together, then rank 0 does `first` and rank 1 `second`."""
    with Group.here(device="cpu", timeout=timeout) as group:
        for step in range(3):
            group.at(step, "training")
            group.agree([1.0])
        # Long enough to be heard of.
        time.sleep(1.2 * BEAT)
        Path(folder, f"ready-{group.rank}").touch()
        what = second if group.rank else first
        if what == "agree":
            group.agree([1.0])
        elif what == "python":
            _stuck_in_python()
        elif what == "native":
            _stuck_in_native_code()
        elif what == "raise":
            raise ValueError("no such file: data.csv")
        elif what == "full":
            _out_of_memory_in_fsdp2(group)
    return None


def begin(folder: Path, first: str, second: str, timeout: float = TIMEOUT) -> Started:
    """Two ranks that have come as far as their parting."""
    folder.mkdir()
    ranks = Started(2, _part, str(folder), first, second, timeout, folder=folder)
    until = time.monotonic() + 60
    while not all((folder / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < until and all(rank.is_alive() for rank in ranks.ranks), "the ranks did not start"
        time.sleep(0.02)
    return ranks


@pytest.fixture
def started():
    """Whatever is started in a test ends with it."""
    found: list[Started] = []
    yield found
    for ranks in found:
        ranks.kill()


@pytest.mark.parametrize("first", often(["agree", "python"], "agree"))
def test_a_rank_is_killed(tmp_path, started, first):
    """Row 11: the other one is out at once, in a collective or in a computation of its own."""
    ranks = begin(tmp_path / "a", first, "python", timeout=120)
    started.append(ranks)
    time.sleep(0.2)
    ranks.ranks[1].kill()
    ranks.ranks[0].join(OUT)
    assert ranks.ranks[0].exitcode == LOST
    assert "rank 1 is gone" in ranks.wait()[0].text


def test_a_rank_stands_still(tmp_path, started):
    """Row 12: frozen, stuck in Python, stuck in native code; found within the timeout and named, with its stack."""
    frozen = begin(tmp_path / "frozen", "agree", "python")
    os.kill(frozen.ranks[1].pid, signal.SIGSTOP)
    python = begin(tmp_path / "python", "agree", "python")
    native = begin(tmp_path / "native", "agree", "native")
    started += [frozen, python, native]
    for ranks in (frozen, python, native):
        ranks.ranks[0].join(TIMEOUT + 15)
        assert ranks.ranks[0].exitcode == LOST
    texts = {}
    for name, ranks in (("frozen", frozen), ("python", python), ("native", native)):
        pid = ranks.ranks[1].pid
        ranks.kill()
        texts[name] = ranks.wait()[0].text
        assert f"rank 1 (process {pid}" in texts[name] and "at step 2 (training)" in texts[name]
        assert "waited 2" in texts[name] and "in agree" in texts[name]
    assert "stopped" in texts["frozen"] and "its stack is unknown" in texts["frozen"]
    assert "_stuck_in_python" in texts["python"]
    assert "_stuck_in_native_code" in texts["native"]


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("raise", 1, "rank 1 ended: ValueError: no such file: data.csv"),
     ("full", LOST, "rank 1 gave up: out of memory while the ranks exchange")],
)  # fmt: skip
def test_a_rank_ends_and_says_why(tmp_path, started, what, code, said):
    ranks = begin(tmp_path / "a", "python" if what == "raise" else what, what, timeout=120)
    started.append(ranks)
    ranks.ranks[1].join(OUT)
    ranks.ranks[0].join(OUT)
    assert ranks.ranks[0].exitcode == LOST
    first, other = ranks.wait()
    assert other.code == code
    assert said in first.text


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from upshift.engine.group import Group

with Group.here(device="cpu") as group:
    if group.rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    group.barrier()
    Path(sys.argv[1], f"pid-{group.rank}").write_text(str(os.getpid()))
    time.sleep(120)
"""


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.extra
def test_the_launcher_is_killed(tmp_path):
    """Row 13: no orphans, not even one that ignores SIGTERM."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = ["--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    launcher = CONTEXT.Process(target=torch.distributed.run.main, args=(arguments,))
    launcher.start()
    pids: list[int] = []
    try:
        until = time.monotonic() + 90
        files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
        while not all(file.exists() and file.read_text() for file in files):
            assert launcher.is_alive() and time.monotonic() < until, "the ranks did not start"
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        assert all(_alive(pid) for pid in pids)
        launcher.kill()
        launcher.join()
        until = time.monotonic() + OUT
        while any(_alive(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(_alive(pid) for pid in pids)
    finally:
        for pid in pids:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.kill()
