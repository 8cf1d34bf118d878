"""The machine: system, processor, cores, OpenMP, NUMA, clock, memory and disks, from recorded trees."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from upshift.hardware.health import clock, disk, memory, system
from upshift.hardware.health.check import Check, carefully, run

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# -- system ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "libc", "state"),
    [("Linux", ("glibc", "2.36"), "ok"), ("Linux", ("glibc", "2.17"), "note"), ("Darwin", ("", ""), "note"),
     ("Windows", ("", ""), "note"), ("Linux", ("glibc", "nonsense"), "ok")],
)  # fmt: skip
def test_system(tmp_path, name, libc, state):
    root = tree(tmp_path, {"etc/os-release": 'NAME="X"\nPRETTY_NAME="Debian GNU/Linux 12"\nbroken line\n'})
    found = system.system(root, name, "6.1", libc, env={})
    assert found.state == state and "Debian GNU/Linux 12" in found.found and "container" not in found.found


def test_musl_has_no_wheels(tmp_path):
    root = tree(tmp_path, {"lib/ld-musl-x86_64.so.1": ""})
    assert system.system(root, "Linux", "6.1", ("", ""), env={}).state == "note"


@pytest.mark.parametrize(
    ("files", "env", "kind"),
    [({".dockerenv": ""}, {}, "docker"), ({"run/.containerenv": ""}, {}, "podman"), ({}, {}, ""),
     ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"), ({"run/systemd/container": "lxc\n"}, {}, "lxc"),
     ({"proc/1/cgroup": "0::/kubepods/pod1"}, {}, "kubepods")],
)  # fmt: skip
def test_containers(tmp_path, files, env, kind):
    assert system.container(tree(tmp_path, files), env) == kind


@pytest.mark.parametrize(
    ("flags", "state", "said"),
    [("sse2 avx2 amx_bf16", "ok", "amx_bf16"), ("sse2 avx2", "ok", "no bf16 in hardware"), ("sse2", "note", "no AVX2"),
     ("", "ok", "not known")],
)  # fmt: skip
def test_the_processor(tmp_path, flags, state, said):
    text = "model name : Some CPU\n" + (f"flags : {flags}\n" if flags else "")
    found = system.processor(tree(tmp_path, {"proc/cpuinfo": text}))
    assert found.state == state and said in found.found and "Some CPU" in found.found


@pytest.mark.parametrize(
    ("quota", "state"),
    [("max 100000", "ok"), ("400000 100000", "ok"), ("300000 100000", "note"), ("100000 100000", "wrong")],
)
def test_a_quota_below_the_affinity(tmp_path, quota, state):
    found = system.cores(tree(tmp_path, {"sys/fs/cgroup/cpu.max": quota}), affinity=4)
    assert found.state == state and bool(found.mend) == (state != "ok")


@pytest.mark.parametrize(
    ("env", "state", "mend"),
    [
        ({}, "ok", ""),
        ({"OMP_NUM_THREADS": "4"}, "ok", ""),
        ({"OMP_NUM_THREADS": "1"}, "note", "unset OMP_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "8"}, "wrong", "unset MKL_NUM_THREADS"),
        ({"OMP_PROC_BIND": "close"}, "note", "unset OMP_PROC_BIND"),
        ({"OMP_PROC_BIND": "false"}, "ok", ""),
        ({"OMP_NUM_THREADS": "4,2"}, "ok", ""),
        ({"KMP_DUPLICATE_LIB_OK": "TRUE"}, "note", "unset KMP_DUPLICATE_LIB_OK"),
    ],
)
def test_openmp(env, state, mend):
    found = system.openmp(env, 4, threads=3)
    assert (found.state, found.mend) == (state, mend) and "3 threads" in found.found


@given(st.frozensets(st.integers(0, 500), max_size=40))
def test_lists_of_the_kernel_are_read_as_they_are_written(cores):
    parts, ordered = [], sorted(cores)
    while ordered:
        last = 0
        while last + 1 < len(ordered) and ordered[last + 1] == ordered[last] + 1:
            last += 1
        parts.append(f"{ordered[0]}-{ordered[last]}" if last else f"{ordered[0]}")
        ordered = ordered[last + 1 :]
    assert system.numbers(",".join(parts) + "\n") == cores


@example("¹")
@given(st.text(max_size=60))
def test_lists_that_are_none_are_read_without_an_error(text):
    system.numbers(text)


TWO_NODES = {f"sys/devices/system/node/node{i}/cpulist": f"{8 * i}-{8 * i + 7}\n" for i in range(2)}


@pytest.mark.parametrize(
    ("files", "cpus", "gpus", "state", "node"),
    [(TWO_NODES, range(16), (), "note", "0"), (TWO_NODES, range(16), (1,), "note", "1"),
     (TWO_NODES, range(8), (), "ok", ""), (TWO_NODES, range(8), (1,), "note", "1"),
     (TWO_NODES, range(8), (-1,), "ok", ""),
     ({"sys/devices/system/node/node0/cpulist": "0-7"}, range(8), (0,), "ok", ""), ({}, range(8), (), "unknown", "")],
)  # fmt: skip
def test_numa(tmp_path, files, cpus, gpus, state, node):
    found = system.numa(tree(tmp_path, files), cpus, gpus)
    assert found.state == state and (f"--cpunodebind={node}" in found.mend if node else not found.mend)


# -- clock -------------------------------------------------------------------------------------------------------------

NOW = 1.8e9


@pytest.mark.parametrize(
    ("now", "newest", "skew", "kept", "state"),
    [
        (NOW, NOW - 10, 0.0, True, "ok"),
        (NOW, NOW + 3600, 0.0, True, "ok"),  # an installation from another time zone
        (NOW, NOW + 2 * 86400, 0.0, True, "wrong"),
        (0.0, 0.0, None, None, "wrong"),  # no battery: 1970
        (NOW, 0.0, 40.0, True, "note"),
        (NOW, 0.0, -40.0, True, "note"),
        (NOW, 0.0, 1.9, True, "ok"),
        (NOW, 0.0, 0.0, False, "note"),
        (NOW, 0.0, None, None, "ok"),
    ],
)
def test_the_clock(now, newest, skew, kept, state):
    found = clock.clock(now, newest, skew, kept, "/data")
    assert found.state == state and bool(found.mend) == (state != "ok")


def test_files_of_this_machine_have_its_time_in_any_time_zone(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        assert abs(clock.file_skew(tmp_path)) < clock.FILE_SECONDS
        assert "2027-01-15 08:00 UTC" in clock.clock(NOW, 0.0, 0.0, None).found
    finally:
        monkeypatch.undo()
        time.tzset()
    assert clock.file_skew(tmp_path / "none") is None
    assert list(tmp_path.iterdir()) == []


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_and_swap():
    assert memory.memory(8 * GIB, 4 * GIB, 8 * GIB).state == "ok"
    cut = memory.memory(8 * GIB, GIB // 2, 64 * GIB)
    assert cut.state == "note" and "the machine has 64 GiB" in cut.found
    states = [memory.swap(*given).state for given in ((0, 0), (8 * GIB, 0), (8 * GIB, 2**20), (8 * GIB, GIB))]
    assert states == ["ok", "ok", "ok", "note"]


@pytest.mark.parametrize("prefix", ["", "memory/"])
def test_file_cache_of_a_group_counts_as_free(tmp_path, prefix):
    names = ("memory.current", "inactive_file") if not prefix else ("memory.usage_in_bytes", "total_inactive_file")
    root = tree(tmp_path, {f"sys/fs/cgroup/{prefix}{names[0]}": f"{6 * GIB}",
                           f"sys/fs/cgroup/{prefix}memory.stat": f"anon 1\n{names[1]} {2 * GIB}\n"})  # fmt: skip
    assert memory.available(8 * GIB, 100 * GIB, root) == 4 * GIB
    assert memory.available(8 * GIB, 3 * GIB, root) == 3 * GIB
    assert memory.available(8 * GIB, 100 * GIB, tmp_path / "none") == 8 * GIB


@pytest.mark.parametrize(
    ("text", "state"),
    [("always [madvise] never", "ok"), ("[always] madvise never", "ok"), ("always madvise [never]", "note"),
     ("", "unknown"), ("what is this", "unknown")],
)  # fmt: skip
def test_huge_pages(tmp_path, text, state):
    found = memory.huge_pages(tree(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": text}))
    assert found.state == state
    assert str(tmp_path) not in found.mend and (state != "note" or "/sys/kernel/mm" in found.mend)


def test_shared_and_locked_memory():
    sizes = (2**26, 2**28, 2**31, None)
    assert [memory.shared_memory(size).state for size in sizes] == ["wrong", "note", "ok", "note"]
    assert memory.shared_memory(2**31, 2**20).state == "wrong"
    given = ((None, True), (2**16, True), (2**16, False), (4 * GIB, True))
    assert [memory.locked_memory(*item).state for item in given] == ["ok", "wrong", "ok", "ok"]


# -- disks -------------------------------------------------------------------------------------------------------------


def room(free: int, **changes: object) -> Check:
    return disk.room("x", disk.Room("/t", free, **changes), "why", "mend")  # type: ignore[arg-type]


def test_room():
    assert [room(size).state for size in (2**20, 2**30, 2**40)] == ["wrong", "note", "ok"]
    assert room(2**40, writable=False).state == "wrong"
    full = room(2**40, entries=0)
    assert full.state == "wrong" and "inodes" in full.found
    seen = disk.Room("/t", 0, writable=False)
    assert disk.room("x", seen, "why", "mend", needed=False).state == "note"


def test_room_of_a_folder_that_is_not_there_yet(tmp_path):
    here = os.statvfs(tmp_path)
    found = disk.room_in(tmp_path / "a" / "b")
    assert found.writable and found.folder.endswith("/a/b")
    assert abs(found.free - here.f_bavail * here.f_frsize) < GIB


def test_kinds_of_file_systems(tmp_path):
    mounts = "dev / ext4 rw 0 0\nnone /mnt tmpfs rw 0 0\nsrv:/x /mnt/my\\040data nfs4 rw 0 0\nbroken\n"
    root = tree(tmp_path, {"proc/self/mounts": mounts})
    kinds = [disk.kind_of(Path(path), root) for path in ("/usr", "/mnt/x", "/mnt/my data/y", "/mnt-not")]
    assert kinds == ["ext4", "tmpfs", "nfs4", "ext4"]
    assert disk.kind_of(Path("/usr"), tmp_path / "none") == ""


def test_a_disk_is_timed_and_left_as_it_was(tmp_path):
    """Against a clock that counts: one second a look, so the figures are known."""
    ticks = iter(range(1000))
    found = disk.time_disk(tmp_path, size=8 * 2**20, limit=100.0, now=lambda: float(next(ticks)))
    assert found.size == 8 * 2**20 and list(tmp_path.iterdir()) == []
    # Two pieces: began 0, one look between them, written at 2; read from 3, three looks, ended at 6.
    assert found.write == pytest.approx(found.size / 2) and found.read == pytest.approx(found.size / 3, rel=0.5)


def test_a_slow_disk_takes_no_longer_than_its_limit(tmp_path):
    ticks = iter(range(1000))
    found = disk.time_disk(tmp_path, size=400 * 2**20, limit=5.0, now=lambda: float(next(ticks)))
    assert found.size <= 4 * disk.PIECE and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        disk.time_disk(tmp_path / "none")


def test_disk_speed_in_words():
    def said(write: float, read: float | None, kind: str = "ext4", cached: bool = False) -> Check:
        return disk.speed(disk.Speed(2**26, 1.0, write, read, cached), "/t", kind)

    assert said(5e8, 1e9).state == "ok" and "measured" in said(5e8, 1e9).found
    assert said(1e7, 1e9).state == "note" and said(5e8, 1e7).state == "note"
    assert said(5e8, 1e7, cached=True).state == "ok" and said(5e8, None).state == "ok"
    assert "memory" in said(1e7, 1e7, "tmpfs").found
    unknown = disk.speed(None, "/t", reason="no room")
    assert unknown.state == "unknown" and "no room" in unknown.found


@pytest.mark.parametrize(
    ("soft", "hard", "state", "mend"),
    [(1024, 1048576, "note", "ulimit -n 65536"), (1024, 1024, "note", "docker run"), (200, None, "wrong", "ulimit -n"),
     (None, None, "ok", ""), (65536, 65536, "ok", ""), (1024, 2048, "note", "ulimit -n 2048")],
)  # fmt: skip
def test_open_files(soft, hard, state, mend):
    found = disk.open_files(soft, hard)
    assert found.state == state and (mend in found.mend if mend else not found.mend)


# -- how checks are run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("odd\ntext"), OSError(5, "I/O error"), RecursionError(), KeyError("x")])
def test_a_check_that_fails_is_unknown_and_says_why(error):
    def look() -> Check:
        raise error

    found = carefully("swap", "memory and disk", look)
    assert found is not None and found.state == "unknown" and type(error).__name__ in found.found
    assert found.why and found.group == "memory and disk" and "\n" not in found.found


def test_text_that_is_no_utf8_becomes_readable():
    found = carefully("module path", "environment", lambda: Check("x", "note", "\udcff/x", "why", "unset \udcff"))
    assert found is not None and found.found == "?/x"
    assert carefully("x", "machine", lambda: None) is None


def test_commands_are_bounded_and_speak_english(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run(["sh", "-c", "echo $LC_ALL; echo oops >&2; exit 3"], 10).code == 3
    assert run(["sh", "-c", "echo $LC_ALL"], 10).out == "C.UTF-8\n"
    assert "cannot be started" in run(["/no/such/program"], 1).problem
    late = run(["sh", "-c", "echo first; sleep 60"], 0.3)
    assert late.code is None and late.out == "first\n" and "did not end" in late.problem
