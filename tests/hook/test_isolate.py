"""Trials write wherever they like and the user's files stay as they were, on every rung that works here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from isolate_model import prepare

import upshift.hook.isolate as isolate
from upshift.hook.isolate import IsolationError, enter, probe, remove_scratch

SOURCE = Path(isolate.__file__).parents[3]
CHILD = Path(__file__).with_name("isolate_child.py")
MODEL = Path(__file__).with_name("isolate_model.py")
FILE_STAGES = ("new_files", "old_files", "databases")
STAGES = (*FILE_STAGES, "tensors", "workers", "children", "services")
IN_USER_NAMESPACE = ("unshare", "--user", "--map-root-user")


def make_user_files(base: Path) -> Path:
    """A project, a home and another folder; returns the project."""
    project = base / "project"
    for folder in ("project/data", "project/old_run/inner", "project/folder_1/sub", "home", "elsewhere"):
        (base / folder).mkdir(parents=True)
    for name in ["notes", "log", "obsolete", "moved", "mode", "truncated", "ckpt_1", "ckpt_9"]:
        (project / f"{name}.txt").write_text(f"{name}\n")
    (project / "log.txt").write_text("line 1\n")
    (project / "data/input.txt").write_text("012345")
    (project / "old_run/inner/ckpt.txt").write_text("precious")
    (project / "folder_1/sub/x.txt").write_text("x")
    (project / "linked.txt").write_text("target")
    (project / "link.txt").symlink_to("linked.txt")
    (project / "data_link").symlink_to(project / "data")
    (project / "old.pt").write_bytes(b"an old checkpoint")
    (project / "model.safetensors").write_bytes(b"an old model")
    connection = sqlite3.connect(project / "old.db")
    with connection:
        connection.execute("create table t (x)")
        connection.execute("insert into t values (0)")
    connection.close()
    shutil.copy(CHILD, project / "train.py")
    (base / "home/.profile").write_text("profile")
    os.utime(project / "notes.txt", (10**9, 10**9))
    return project


def snapshot(*roots: Path) -> dict[str, tuple[Any, ...]]:
    """Names, kinds, modes, times and contents of all there is."""
    found: dict[str, tuple[Any, ...]] = {}
    for root in roots:
        for path in [root, *sorted(root.rglob("*"))]:
            status = path.lstat()
            content = ""
            if path.is_symlink():
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_mtime_ns,
                status.st_size,
                content,
            )
    return found


def child_environment(base: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TMPDIR", "PYTHONDONTWRITE"))}
    return {**clean, "HOME": str(base / "home"), "PYTHONPATH": search_path()}


def search_path() -> str:
    return os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))


@dataclass
class Trial:
    """What a child reported and left behind."""

    name: str
    answer: dict[str, Any]
    before: dict[str, tuple[Any, ...]]
    after: dict[str, tuple[Any, ...]]
    keep: Path
    scratch: Path


def run_trial(base: Path, rung: str, stages: tuple[str, ...] = STAGES, prefix: tuple[str, ...] = ()) -> Trial:
    project = make_user_files(base)
    scratch, keep = base / "scratch", base / "keep"
    scratch.mkdir()
    keep.mkdir()
    (keep / "old.txt").write_text("old")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(project / "service.sock"))
        server.listen()
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        roots = (project, base / "home", base / "elsewhere")
        before = snapshot(*roots)
        done = subprocess.run(
            [*prefix, sys.executable, "train.py", rung, scratch, keep, base / "elsewhere", *stages],
            cwd=project, env=child_environment(base), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        after = snapshot(*roots)
    if done.returncode and "IsolationError" in done.stderr:
        pytest.skip(done.stderr.strip()[-500:])
    assert done.returncode == 0, done.stderr
    return Trial(rung, json.loads(done.stdout.splitlines()[-1]), before, after, keep, scratch)


def _answer(server: socket.socket) -> None:
    try:
        connection, _ = server.accept()
        connection.sendall(connection.recv(16).upper())
    except OSError:
        pass


KINDS = ("overlay", "overlay in a user namespace", "landlock", "redirect")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Trial]]]:
    """All kinds side by side, as most of the time goes into importing torch."""
    folders = {kind: tmp_path_factory.mktemp("t") for kind in KINDS}
    with ThreadPoolExecutor(len(KINDS)) as pool:
        yield {kind: pool.submit(run_kind, kind, folder) for kind, folder in folders.items()}


def run_kind(kind: str, folder: Path) -> Trial:
    if not kind.endswith("namespace"):
        return run_trial(folder, kind)
    if not shutil.which("unshare") or subprocess.run([*IN_USER_NAMESPACE, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    return run_trial(folder, kind.split()[0], prefix=IN_USER_NAMESPACE)


@pytest.fixture(params=KINDS)
def trial(request: pytest.FixtureRequest, trials: dict[str, Future[Trial]]) -> Trial:
    return trials[request.param].result()


def test_enters_the_rung_and_keeps_the_working_directory(trial: Trial) -> None:
    assert trial.answer["rung"] == trial.name
    assert trial.answer["cwd"] is True
    assert trial.answer["detail"].endswith(".") and "\n" not in trial.answer["detail"]
    assert trial.answer["seconds"] < 10


def test_new_files_are_seen_by_the_script(trial: Trial) -> None:
    found = trial.answer["new_files"]
    assert found == {
        "relative": "a",
        "absolute": "b",
        "beside the script": "c",
        "home": "d",
        "pathlib": "e",
        "exists": [True, True, 1],
        "listed": found["listed"],
        "walked": ["runs/e.txt", "runs/exp1/deep/a.txt"],
        "globbed": ["runs/e.txt", "runs/exp1/deep/a.txt"],
        "rglobbed": ["runs/e.txt", "runs/exp1/deep/a.txt"],
        "exclusive": "FileExistsError",
        "exclusive on an old file": "FileExistsError",
        "missing folder": "FileNotFoundError",
        "making an old folder": "FileExistsError",
        "name": "runs/e.txt",
        "atomic": "t",
        "os.open": "low",
        "through links": ["a", "a"],
        "real path": "runs/exp1/deep/a.txt",
        "after chdir": ["a", "runs/exp1", "h"],
        "back": "h",
        "temporary": "x",
    }
    assert {"runs", "out", "notes.txt", "data"} <= set(found["listed"])


def test_old_files_change_for_the_script_only(trial: Trial) -> None:
    found = trial.answer["old_files"]
    entries = {name: (folder, link) for name, folder, link in found.pop("entries")}
    assert found == {
        "overwritten": "new",
        "appended": "line 1\nline 2\n",
        "updated": "01XX45",
        "through a link": "linked",
        "read through data link": "01XX45",
        "removed": [False, False, "FileNotFoundError"],
        "removed twice": "FileNotFoundError",
        "recreated": "again",
        "tree removed": [False, False],
        "tree made anew": [],
        "renamed": [False, "ckpt_1\n"],
        "folder renamed": [False, "x", ["sub"]],
        "moved": [False, "moved\n"],
        "copied": "x",
        "mode and time": ["0o600", 1.0],
        "truncated": "t",
        "linked": True,
        "not empty": "OSError",
        "a folder is no file": "IsADirectoryError",
        "open a folder": "IsADirectoryError",
    }
    assert entries["folder_2"] == (True, False) and entries["link.txt"] == (False, True)
    assert entries["data_link"] == (True, True) and "folder_1" not in entries and "ckpt_1.txt" not in entries


def test_databases(trial: Trial) -> None:
    assert trial.answer["databases"] == {"rows": [2, 1, 1, 2], "sizes": [True, True]}


def test_tensors_written_from_native_code(trial: Trial) -> None:
    found = trial.answer["tensors"]
    assert found["saved"] == found["mapped"] == 3 and found["saved elsewhere"] == [2]
    assert found.get("safetensors", 5) == 5


def test_forked_workers_and_shared_memory(trial: Trial) -> None:
    assert trial.answer["workers"] == {
        "batches": [[0, 1], [2, 3]],
        "written by workers": ["0", "1", "2", "3"],
        "written by a fork": "child",
        "shared memory": 7,
        "in /dev/shm": "s",
        "cleaned": None,
        "null": 1,
    }


def test_child_processes(trial: Trial) -> None:
    found = trial.answer["children"]
    if trial.name == "overlay":
        assert found == {"python": True, "shell": True, "seen": [True, True, False], "temporary": True}
    if trial.name == "landlock":
        assert found == {"python": False, "shell": False, "seen": [False, False, True], "temporary": True}


def test_services_started_before_can_be_reached(trial: Trial) -> None:
    assert trial.answer["services"] == {"answer": "HELLO"}


def test_the_real_files_are_untouched(trial: Trial) -> None:
    if trial.name == "redirect":  # child processes are outside its reach, so they did write
        beyond = {"sh.txt", "py.txt", "log.txt", "notes.txt", "ckpt_9.txt", "project", "elsewhere"}
        for state in (trial.before, trial.after):
            for path in [path for path in state if Path(path).name in beyond]:
                del state[path]
    assert trial.after == trial.before


def test_kept_folders_are_written_for_real(trial: Trial) -> None:
    assert sorted(path.name for path in trial.keep.iterdir()) == ["final.txt", "inner"]
    assert (trial.keep / "inner/record.txt").read_text() == "kept"
    assert (trial.keep / "final.txt").read_text() == "kept"


def test_scratch_can_be_removed(trial: Trial) -> None:
    remove_scratch(trial.scratch)
    remove_scratch(trial.scratch)
    assert not trial.scratch.exists()


def test_redirection_alone_protects_from_python_code(tmp_path: Path) -> None:
    trial = run_trial(tmp_path, "redirect", FILE_STAGES)
    assert trial.after == trial.before


def test_the_strongest_rung_is_chosen(tmp_path: Path) -> None:
    trial = run_trial(tmp_path, "auto", ("old_files",))
    assert trial.answer["rung"] == probe()
    assert trial.after == trial.before


@pytest.mark.parametrize("rung", ["overlay", "landlock", "redirect"])
def test_isolation_behaves_like_the_file_system(tmp_path: Path, rung: str) -> None:
    outputs = []
    for seed in (1, 2) if rung == "redirect" else (3,):
        for place in ("none", rung):
            project, scratch = tmp_path / f"{place}{seed}", tmp_path / f"scratch {place}{seed}"
            for path in (project, scratch):
                path.mkdir()
            prepare(project)
            before = snapshot(project)
            done = subprocess.run(
                [sys.executable, MODEL, place, scratch, str(seed), "80"],
                cwd=project, env=child_environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            if "IsolationError" in done.stderr:
                pytest.skip(done.stderr.strip().splitlines()[-1])
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
            if place != "none":
                assert snapshot(project) == before
        assert outputs[-1] == outputs[-2]


def in_child(code: str, *arguments: object, cwd: Path | None = None) -> str:
    preamble = "import sys, os, pathlib\nfrom upshift.hook.isolate import IsolationError, enter, kernel, landlock\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": search_path()}, cwd=cwd, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_forced_rung_that_does_not_work_raises(tmp_path: Path) -> None:
    code = """
kernel.namespaces = lambda: kernel.call("unshare", -1)
landlock._SYS_CREATE_RULESET = 9999
for rung in ("overlay", "landlock"):
    try:
        enter(pathlib.Path(sys.argv[1]), rung=rung)
    except IsolationError as error:
        print(rung, bool(error.remedy), os.listdir(sys.argv[1]))
print(enter(pathlib.Path(sys.argv[1])).rung)
"""
    assert in_child(code, tmp_path).splitlines() == ["overlay True []", "landlock True []", "redirect"]


def test_a_process_with_threads_is_not_isolated_by_halves(tmp_path: Path) -> None:
    code = """
import threading
done = threading.Event()
threading.Thread(target=done.wait).start()
for rung in ("overlay", "landlock"):
    try:
        enter(pathlib.Path(sys.argv[1]), rung=rung)
    except IsolationError as error:
        print("threads" in error.message)
done.set()
"""
    assert in_child(code, tmp_path).split() == ["True", "True"]


def test_landlock_is_next_where_mounting_is_refused(tmp_path: Path) -> None:
    try:
        landlock_works = isolate.landlock.abi() >= 1
    except OSError:
        landlock_works = False
    if not landlock_works:
        pytest.skip("no Landlock here")
    # A process under Landlock may not mount anything.
    code = "landlock.restrict([sys.argv[1]]); print(enter(pathlib.Path(sys.argv[1])).rung)"
    assert in_child(code, tmp_path) == "landlock"


def test_what_is_written_is_held_in_memory_where_scratch_cannot_hold_it(tmp_path: Path) -> None:
    code = """
original = kernel.mount_overlay
def refuse(lower, upper, *rest):
    if upper.startswith(sys.argv[1] + "/upper"):
        raise OSError(22, "not supported as an upper layer")
    original(lower, upper, *rest)
kernel.mount_overlay = refuse
print(enter(pathlib.Path(sys.argv[1]), rung="overlay").detail)
pathlib.Path("x.txt").write_text("x")
"""
    scratch, project = tmp_path / "scratch", tmp_path / "project"
    scratch.mkdir()
    project.mkdir()
    if probe() != "overlay":
        pytest.skip("no overlays here")
    assert "held in memory" in in_child(code, scratch, cwd=project)
    assert not list(project.iterdir())
    remove_scratch(scratch)


@pytest.mark.parametrize("name", ["with, commas: and \\ colons", "ünï cödé", "new\nline"])
def test_any_folder_name(tmp_path: Path, name: str) -> None:
    scratch, project = tmp_path / "s" / name, tmp_path / "p" / name
    scratch.mkdir(parents=True)
    project.mkdir(parents=True)
    code = """
enter(pathlib.Path(sys.argv[1]))
pathlib.Path('x').write_text('x')
print(os.listdir('.'), os.getcwd() == sys.argv[2])
"""
    assert in_child(code, scratch, project, cwd=project) == "['x'] True"
    assert not list(project.iterdir())
    remove_scratch(scratch)


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for scratch, keep, rung in (
        ("missing", [], None),
        ("full", [], None),
        ("empty", ["missing"], None),
        ("empty", ["empty"], None),
        ("empty", [], "chroot"),
    ):
        with pytest.raises(IsolationError) as caught:
            enter(tmp_path / scratch, [tmp_path / name for name in keep], rung)
        assert caught.value.remedy


def test_mount_table_with_hidden_and_stacked_mounts() -> None:
    table = """\
20 1 8:1 / / rw,relatime - ext4 /dev/a rw
21 20 0:5 / /dev rw - devtmpfs dev rw
22 21 0:6 / /dev/shm rw - tmpfs shm rw
23 22 0:7 / /dev/shm rw,nosuid - tmpfs shm rw
24 20 8:2 / /home/with\\040space ro - ext4 /dev/b rw
25 20 8:3 / /mnt/a/b rw - ext4 /dev/c rw
26 20 8:4 / /mnt/a rw - vfat /dev/d ro
"""
    mounts = isolate.kernel.Mounts(table)
    assert mounts.under("/") == ["/dev", "/home/with space", "/mnt/a"]
    assert mounts.under("/dev") == ["/dev/shm"]
    assert mounts.holding("/mnt/a/b/c").kind == "vfat" and "ro" in mounts.holding("/mnt/a").options
    assert mounts.holding("/dev/shm/x").options >= {"nosuid"}
    assert mounts.at("/home") is None and mounts.holding("/homes").point == "/"


def test_removing_what_an_overlay_leaves(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "work" / "work" / "inner").mkdir(parents=True)
    (scratch / "upper").symlink_to(tmp_path)
    (scratch / "work" / "work").chmod(0)
    remove_scratch(scratch)
    assert not scratch.exists() and tmp_path.exists()
