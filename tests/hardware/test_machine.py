"""Container limits are read from recorded trees of both control group versions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from upshift.hardware import machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_v2_takes_the_tightest_limit_of_the_group_and_its_ancestors(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "1073741824\n",
            "sys/fs/cgroup/pod/memory.max": "max\n",
        },
    )
    assert machine.cpu_quota(root) == 1.5
    assert machine.usable_cores(root) == min(2, len(os.sched_getaffinity(0)))
    assert machine.memory_limit(root) == min(1073741824, psutil.virtual_memory().total)


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_v1_reads_the_mount_where_the_hosts_path_is_not_there(tmp_path: Path, mount: str) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": "50000\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert machine.cpu_quota(root) == 0.5
    assert machine.usable_cores(root) == 1
    assert machine.memory_limit(root) == 536870912


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.cpu_quota(root) is None
    assert machine.usable_cores(root) == len(os.sched_getaffinity(0))
    assert machine.memory_limit(root) == psutil.virtual_memory().total


def test_an_empty_tree_and_a_path_that_climbs_out_are_survived(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) is None
    assert machine.cpu_features(tmp_path) == frozenset()
    assert machine.bf16_native(tmp_path) is None
    assert machine.last_level_cache(tmp_path) is None
    root = tree(tmp_path, {"proc/self/cgroup": "0::/../../x\n", "x/cpu.max": "1000 100000\n"})
    assert machine.cpu_quota(root) is None


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd bf16 svebf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("flags\t\t: fpu bf160 xbf16\n", False),
    ],
)
def test_bf16_is_read_from_the_processors_flags(tmp_path: Path, text: str, native: bool) -> None:
    assert machine.bf16_native(tree(tmp_path, {"proc/cpuinfo": text})) is native


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    base = "sys/devices/system/cpu/cpu0/cache"
    root = tree(tmp_path, {f"{base}/index0/size": "32K\n", f"{base}/index3/size": "32M\n", f"{base}/index4/size": "?"})
    assert machine.last_level_cache(root) == 32 * 2**20


def test_compiler_is_looked_for_where_it_would_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not machine.has_compiler()
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("clang++", "c++", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert not machine.has_compiler()
    for wanted, there in (("mine", True), ("mine -O1", False), ("not-there", False), ("", False)):
        monkeypatch.setenv("CXX", wanted)
        assert machine.has_compiler() is there and machine.has_compiler(dict(os.environ)) is there
    monkeypatch.delenv("CXX")
    (tmp_path / "mine").rename(tmp_path / "g++")
    assert machine.has_compiler() and machine.compiler_name({}) == "g++"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.has_compiler() and machine.compiler_name({}) == "clang++"


def test_describe_is_words_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from upshift.hardware import machine, catalog, probe; d = machine.describe(); catalog.devices();"
        "assert all(isinstance(v, str) and v for v in d.values()), d;"
        "assert set(d) == {'cpu', 'cores', 'memory', 'os', 'python', 'bf16', 'compiler'};"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
