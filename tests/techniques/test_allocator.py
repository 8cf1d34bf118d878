"""allocator: what is put into the environment of the training process, and what a real process makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upshift.sites import ModelSeen, NoEffect, ProcessEnv
from upshift.techniques.allocator import Allocator, find_library, glibc_version
from upshift.testing.contract import measurement

TECHNIQUE = Allocator()
GLIBC = glibc_version()

pytestmark = pytest.mark.skipif(GLIBC is None, reason="Linux with glibc only")


def at(env, kind):
    return TECHNIQUE.at(ProcessEnv(env=env), {"kind": kind})


def installed(kind):
    if find_library(kind, os.environ) is None:
        pytest.skip(f"{kind} is not installed")


def test_glibc_settings_are_added_and_taken_back():
    env = {"PATH": "/bin"}
    applied = at(env, "glibc")
    assert env["MALLOC_MMAP_MAX_"] == "0" and env["PATH"] == "/bin" and applied.note
    assert ("GLIBC_TUNABLES" in env) == (GLIBC >= (2, 35))
    applied.close()
    applied.close()
    assert env == {"PATH": "/bin"}
    with pytest.raises(NotImplementedError):
        applied.switch(False)


@pytest.mark.parametrize(
    "variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"]
)
def test_a_value_of_the_user_wins(variable):
    env = {variable: "123456"}
    outcome = at(env, "glibc")
    assert isinstance(outcome, NoEffect) and variable in outcome.reason and env == {variable: "123456"}


def test_tunables_of_the_user_are_kept():
    outcome = at({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "glibc")
    assert isinstance(outcome, NoEffect)
    env = {"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off"}
    applied = at(env, "glibc")
    assert env["GLIBC_TUNABLES"].startswith("glibc.cpu.x86_ibt=off")
    applied.close()
    assert env == {"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off"}


def test_what_somebody_set_since_is_not_taken_back():
    env = {}
    applied = at(env, "glibc")
    env["MALLOC_TOP_PAD_"] = "1"
    applied.close()
    assert env == {"MALLOC_TOP_PAD_": "1"}


@pytest.mark.parametrize("kind", ["tcmalloc", "jemalloc"])
def test_a_preloaded_library_of_the_user_is_kept(kind, tmp_path):
    fake_install(tmp_path, kind)
    env = {"LD_PRELOAD": "/opt/mine.so", "CONDA_PREFIX": str(tmp_path)}
    applied = at(env, kind)
    first, second = env["LD_PRELOAD"].split(":")
    assert kind in first and Path(first).parent == tmp_path / "lib" and second == "/opt/mine.so"
    applied.close()
    assert env == {"LD_PRELOAD": "/opt/mine.so", "CONDA_PREFIX": str(tmp_path)}


def fake_install(prefix, kind):
    """An ELF file of this machine's architecture under the name the library has."""
    (prefix / "lib").mkdir()
    name = {"tcmalloc": "libtcmalloc_minimal.so.4", "jemalloc": "libjemalloc.so.2"}[kind]
    (prefix / "lib" / name).write_bytes(Path(sys.executable).resolve().read_bytes()[:64])
    return prefix / "lib" / name


def test_a_library_for_another_architecture_is_passed_over(tmp_path):
    path = fake_install(tmp_path, "tcmalloc")
    assert find_library("tcmalloc", {"CONDA_PREFIX": str(tmp_path)}) == path
    head = bytearray(path.read_bytes())
    head[18] ^= 0xFF
    path.write_bytes(head)
    assert find_library("tcmalloc", {"CONDA_PREFIX": str(tmp_path)}) != path


def test_a_path_the_loader_would_split_is_passed_over(tmp_path):
    prefix = tmp_path / "with blank"
    prefix.mkdir()
    path = fake_install(prefix, "tcmalloc")
    assert find_library("tcmalloc", {"CONDA_PREFIX": str(prefix)}) != path


def test_another_allocator_of_the_user_wins():
    for kind in ("tcmalloc", "jemalloc", "glibc"):
        env = {"LD_PRELOAD": "/usr/lib/libmimalloc.so"}
        outcome = at(env, kind)
        assert isinstance(outcome, NoEffect) and "mimalloc" in outcome.reason
        assert env == {"LD_PRELOAD": "/usr/lib/libmimalloc.so"}


def test_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("upshift.techniques.allocator.find_library", lambda kind, env: None)
    env = {}
    outcome = at(env, "jemalloc")
    assert isinstance(outcome, NoEffect) and "libjemalloc.so.2" in outcome.reason and env == {}


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(at({}, "glibc"), NoEffect)


def test_other_sites_are_not_its_business():
    assert TECHNIQUE.at(ModelSeen(module=None), {"kind": "glibc"}) is None


CHURN = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 48 * 2**20
def churn(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
churn(2)
print(churn(10), *sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}))
"""


def faults(env):
    done = subprocess.run([sys.executable, "-c", CHURN], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    count, *loaded = done.stdout.split()
    return int(count), loaded


def clean():
    names = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_CONF")
    return {key: value for key, value in os.environ.items() if key not in names and not key.startswith("MALLOC_")}


def test_memory_of_large_blocks_stays_in_a_real_process():
    plain, _ = faults(clean())
    env = clean()
    at(env, "glibc")
    kept, _ = faults(env)
    # 48 MiB are 12,288 pages of 4 KiB, taken anew ten times, against none.
    assert plain >= 10 * 20 and kept < plain / 10, (plain, kept)


@pytest.mark.parametrize("kind", ["tcmalloc", "jemalloc"])
def test_the_library_is_loaded_by_a_real_process_without_a_word_on_stderr(kind):
    installed(kind)
    env = clean()
    applied = at(env, kind)
    assert not isinstance(applied, NoEffect)
    kept, loaded = faults(env)
    assert any(kind in path for path in loaded)
    plain, _ = faults(clean())
    assert kept < plain / 10, (plain, kept)


def test_check():
    verdict = TECHNIQUE.check(measurement())
    assert verdict.applies and [item["kind"] for item in verdict.candidates] == ["glibc", "tcmalloc", "jemalloc"]
    assert not TECHNIQUE.check(measurement(allocator="jemalloc")).applies
    assert not TECHNIQUE.check(measurement(device="cuda:0")).applies


def test_nothing_of_torch_is_imported_in_the_parent():
    code = (
        "import sys\nfrom upshift.sites import ProcessEnv\nfrom upshift.techniques.allocator import Allocator\n"
        "for kind in ('tcmalloc', 'jemalloc', 'glibc'): Allocator().at(ProcessEnv(env={}), {'kind': kind})\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
