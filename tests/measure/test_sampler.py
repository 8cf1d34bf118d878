"""Samples against a thread whose stack is known."""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from upshift.measure.sampler import HostSampler, source_line, wilson

SCRIPT = """
import time

def slow(seconds):
    time.sleep(seconds)  # the slow line

def fast(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass

class Data:
    def __len__(self):
        return 1000
    def __getitem__(self, i):
        time.sleep(0.004)  # the dataset's line
        return i
"""


@pytest.fixture
def script(tmp_path: Path) -> ModuleType:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    module = ModuleType("script")
    module.__file__ = str(file)
    exec(compile(SCRIPT, str(file), "exec"), module.__dict__)
    return module


def sampler(script: ModuleType, hz: float = 200) -> HostSampler:
    return HostSampler(threading.get_ident(), lambda file: file == script.__file__, hz=hz)


def wait_for(found: HostSampler, looks: int, work) -> None:
    """Work until the sampler has looked often enough, however slow the machine."""
    end = time.monotonic() + 60
    while found.looks < looks:
        assert time.monotonic() < end
        work()


def test_time_goes_to_the_innermost_user_line(script: ModuleType) -> None:
    found = sampler(script)
    found.start()
    wait_for(found, 60, lambda: script.slow(0.02))
    lines = found.stop()
    top = lines[0]
    assert top.text == "time.sleep(seconds)  # the slow line"
    assert (top.function, top.line, top.kind, top.file) == ("slow", 5, "host", script.__file__)
    assert top.share.value is not None and top.share.value > 0.8
    assert top.share.low is not None and top.share.high is not None
    assert top.share.low <= top.share.value <= top.share.high <= 1
    assert top.share.n == found.looks
    assert top.seconds.value == pytest.approx(top.share.value * found.watched)
    assert 0 < found.cpu_share() < 1
    assert found.stop() == lines


def test_what_takes_longer_gets_the_larger_share(script: ModuleType) -> None:
    found = sampler(script)

    def work() -> None:
        script.slow(0.05)
        script.fast(0.01)

    found.start()
    wait_for(found, 200, work)
    shares: dict[str, float] = {}
    for line in found.stop():
        shares[line.function] = shares.get(line.function, 0.0) + (line.share.value or 0)
    assert shares["slow"] > shares.get("fast", 0.0)
    assert sum(shares.values()) <= 1 + 1e-9


def test_the_dataset_is_seen_through_the_loader(script: ModuleType) -> None:
    class Wrapped(script.Data, Dataset):  # type: ignore[name-defined,misc]
        pass

    found = sampler(script)
    found.start()
    wait_for(found, 40, lambda: next(iter(DataLoader(Wrapped(), batch_size=5))))
    top = found.stop()[0]
    assert top.kind == "data" and top.function == "__getitem__" and "the dataset's line" in top.text


def test_a_librarys_dataset_is_charged_to_the_line_that_asks(script: ModuleType) -> None:
    class Library(Dataset):  # this file is no user file here
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> int:
            time.sleep(0.004)
            return index

    script.__dict__["loader"] = DataLoader(Library(), batch_size=5)
    text = SCRIPT + "\ndef loop():\n    for batch in loader:\n        pass\n"
    Path(script.__file__ or "").write_text(text)
    exec(compile(text, script.__file__ or "", "exec"), script.__dict__)
    found = sampler(script)
    found.start()
    wait_for(found, 40, script.__dict__["loop"])
    top = found.stop()[0]
    assert (top.kind, top.function, top.text) == ("data", "loop", "for batch in loader:")


def test_paused_time_does_not_count(script: ModuleType) -> None:
    found = sampler(script)
    found.start()
    wait_for(found, 10, lambda: script.fast(0.01))
    found.pause()
    before, watched = found.looks, found.watched
    script.slow(0.3)
    assert (found.looks, found.watched) == (before, watched)
    found.resume()
    wait_for(found, before + 10, lambda: script.fast(0.01))
    assert all(line.function != "slow" for line in found.stop())


def test_nothing_watched_is_no_lines_and_a_dead_thread_is_survived() -> None:
    assert HostSampler(threading.get_ident(), lambda file: True).lines() == ()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    found = HostSampler(thread.ident or 0, lambda file: True, hz=500)
    found.start()
    wait_for(found, 3, lambda: time.sleep(0.01))
    assert found.stop() == ()


def test_a_failing_predicate_ends_nothing() -> None:
    def predicate(file: str) -> bool:
        raise OSError

    found = HostSampler(threading.get_ident(), predicate, hz=500)
    found.start()
    wait_for(found, 5, lambda: time.sleep(0.01))
    assert found.stop() == ()


def test_the_scripts_random_numbers_are_left_alone(script: ModuleType) -> None:
    random.seed(3)
    torch.manual_seed(3)
    state, torch_state = random.getstate(), torch.get_rng_state()
    found = sampler(script)
    found.start()
    wait_for(found, 10, lambda: script.fast(0.01))
    found.stop()
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


def test_no_frame_of_the_script_is_kept_alive(script: ModuleType) -> None:
    import gc
    import weakref

    found = sampler(script)
    found.start()

    def work() -> weakref.ref[torch.Tensor]:
        tensor = torch.ones(3)
        wait_for(found, found.looks + 5, lambda: script.slow(0.01))
        return weakref.ref(tensor)

    reference = work()
    found.stop()
    gc.collect()
    assert reference() is None


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="hz"):
        HostSampler(1, lambda file: True, hz=0)
    found = HostSampler(threading.get_ident(), lambda file: False)
    found.start()
    with pytest.raises(RuntimeError):
        found.start()
    found.stop()


def test_source_line_is_safe(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = '" + "y" * 500 + "'\n")
    assert len(source_line(str(file), 1)) == 200
    assert source_line(str(file), 99) == "" and source_line("<string>", 1) == "" and source_line("", 0) == ""
    binary = tmp_path / "b.py"
    binary.write_bytes(bytes(range(256)))
    assert source_line(str(binary), 1) == ""


@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_solves_its_defining_equation(successes: int, n: int) -> None:
    """The ends are where (share - p)^2 = z^2 p (1 - p) / n."""
    successes = min(successes, n)
    share, z = successes / n, 1.959964
    low, high = wilson(successes, n)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, rel=1e-6, abs=1e-12)


def test_wilson_without_observations() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_module_needs_no_torch() -> None:
    import subprocess

    code = "import sys, upshift.measure.sampler; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
