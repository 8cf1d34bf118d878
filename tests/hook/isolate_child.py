"""Run in a child of test_isolate.py: enter isolation, write wherever a script might, report what is seen.

Usage: python isolate_child.py RUNG SCRATCH KEEP ELSEWHERE STAGE...; the working directory is the user's
project, which has a copy of this file. Prints a JSON object: the rung, its detail, and what each stage found.
"""

from __future__ import annotations

import glob
import json
import multiprocessing
import os
import pathlib
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import shared_memory

HERE = pathlib.Path(__file__).resolve().parent


def text(path: str | pathlib.Path) -> str:
    with open(path) as file:
        return file.read()


def write(path: str | pathlib.Path, content: str, mode: str = "w") -> str:
    with open(path, mode) as file:
        file.write(content)
    return text(path)


def touch(path: str, mode: str = "w") -> str:
    with open(path, mode) as file:
        return str(file.name)


def raises(function: Callable[..., object], *arguments: object) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def new_files(elsewhere: pathlib.Path) -> dict[str, object]:
    os.makedirs("runs/exp1/deep")
    (HERE / "out").mkdir()
    found: dict[str, object] = {
        "relative": write("runs/exp1/deep/a.txt", "a"),
        "absolute": write(elsewhere / "b.txt", "b"),
        "beside the script": write(HERE / "out" / "c.txt", "c"),
        "home": write(os.path.expanduser("~/d.txt"), "d"),
        "pathlib": pathlib.Path("runs/e.txt").write_text("e") and pathlib.Path("runs/e.txt").read_text(),
        "exists": [
            os.path.exists("runs/e.txt"),
            pathlib.Path("runs/exp1").is_dir(),
            os.path.getsize("runs/e.txt"),
        ],
        "listed": sorted(os.listdir(".")),
        "walked": sorted(os.path.join(folder, name) for folder, _, names in os.walk("runs") for name in names),
        "globbed": sorted(glob.glob("runs/**/*.txt", recursive=True)),
        "rglobbed": sorted(map(str, pathlib.Path("runs").rglob("*.txt"))),
        "exclusive": raises(touch, "runs/e.txt", "x"),
        "exclusive on an old file": raises(touch, "notes.txt", "x"),
        "missing folder": raises(touch, "nowhere/x.txt"),
        "making an old folder": raises(os.mkdir, "data"),
        "name": touch("runs/e.txt", "r"),
    }
    with tempfile.NamedTemporaryFile("w", dir="runs", delete=False) as file:
        file.write("t")
    os.replace(file.name, "runs/atomic.txt")
    found["atomic"] = text("runs/atomic.txt")
    descriptor = os.open("runs/low.bin", os.O_CREAT | os.O_RDWR, 0o600)
    os.write(descriptor, b"low")
    os.close(descriptor)
    found["os.open"] = text("runs/low.bin")
    os.symlink("exp1", "runs/latest")
    os.symlink(os.path.abspath("runs/exp1"), "runs/latest_absolute")
    found["through links"] = [text("runs/latest/deep/a.txt"), text("runs/latest_absolute/deep/a.txt")]
    found["real path"] = os.path.relpath(os.path.realpath("runs/latest/deep/a.txt"))
    os.chdir("runs/exp1")
    found["after chdir"] = [text("deep/a.txt"), os.path.relpath(os.getcwd(), HERE), write("here.txt", "h")]
    os.chdir("../..")
    found["back"] = os.getcwd() == str(HERE) and text("runs/exp1/here.txt")
    found["temporary"] = write(pathlib.Path(tempfile.mkdtemp()) / "x", "x")
    return found


def old_files(elsewhere: pathlib.Path) -> dict[str, object]:
    found: dict[str, object] = {
        "overwritten": write("notes.txt", "new"),
        "appended": write("log.txt", "line 2\n", "a"),
        "updated": "",
        "through a link": write("link.txt", "linked"),
    }
    with open("data/input.txt", "r+") as file:
        file.seek(2)
        file.write("XX")
    found["updated"] = text("data/input.txt")
    found["read through data link"] = text("data_link/input.txt")
    os.remove("obsolete.txt")
    found["removed"] = [
        os.path.exists("obsolete.txt"),
        "obsolete.txt" in os.listdir("."),
        raises(text, "obsolete.txt"),
    ]
    found["removed twice"] = raises(os.remove, "obsolete.txt")
    found["recreated"] = write("obsolete.txt", "again")
    shutil.rmtree("old_run")
    found["tree removed"] = [os.path.exists("old_run"), os.path.exists("old_run/inner/ckpt.txt")]
    os.makedirs("old_run")
    found["tree made anew"] = os.listdir("old_run")
    os.rename("ckpt_1.txt", "ckpt_2.txt")
    found["renamed"] = [os.path.exists("ckpt_1.txt"), text("ckpt_2.txt")]
    os.rename("folder_1", "folder_2")
    found["folder renamed"] = [os.path.exists("folder_1"), text("folder_2/sub/x.txt"), os.listdir("folder_2")]
    shutil.move("moved.txt", elsewhere / "moved.txt")
    found["moved"] = [os.path.exists("moved.txt"), text(elsewhere / "moved.txt")]
    shutil.copytree("folder_2", "folder_3")
    found["copied"] = text("folder_3/sub/x.txt")
    os.chmod("mode.txt", 0o600)
    os.utime("mode.txt", (1, 1))
    found["mode and time"] = [oct(os.stat("mode.txt").st_mode & 0o777), os.stat("mode.txt").st_mtime]
    os.truncate("truncated.txt", 1)
    found["truncated"] = text("truncated.txt")
    os.link("mode.txt", "hard.txt")
    found["linked"] = os.path.exists("hard.txt")
    found["not empty"] = raises(os.rmdir, "folder_2")
    found["a folder is no file"] = raises(os.remove, "folder_2")
    found["open a folder"] = raises(touch, "folder_2")
    found["entries"] = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in os.scandir("."))
    return found


def databases(elsewhere: pathlib.Path) -> dict[str, object]:
    counts = []
    for name, uri in (("old.db", False), ("new.db", False), (f"file:{elsewhere / 'u.db'}?mode=rwc", True)):
        connection = sqlite3.connect(name, uri=uri)
        with connection:
            connection.execute("create table if not exists t (x)")
            connection.execute("insert into t values (1)")
        counts.append(connection.execute("select count(*) from t").fetchone()[0])
        connection.close()
    again = sqlite3.connect("file:old.db?mode=ro", uri=True)
    counts.append(again.execute("select count(*) from t").fetchone()[0])
    again.close()
    return {"rows": counts, "sizes": [os.path.getsize(name) > 0 for name in ("old.db", "new.db")]}


def tensors(elsewhere: pathlib.Path) -> dict[str, object]:
    import torch

    torch.save({"a": torch.ones(3)}, "old.pt")
    torch.save(torch.zeros(2), elsewhere / "new.pt")
    found: dict[str, object] = {
        "saved": torch.load("old.pt")["a"].sum().item(),
        "saved elsewhere": list(torch.load(elsewhere / "new.pt").shape),
        "mapped": torch.load("old.pt", mmap=True)["a"].sum().item(),
    }
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        return found
    save_file({"a": torch.ones(5)}, "model.safetensors")
    found["safetensors"] = load_file("model.safetensors")["a"].sum().item()
    return found


class _Written:
    """A data set whose workers write and read files."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        import torch

        os.makedirs("cache", exist_ok=True)
        return torch.tensor(float(write(f"cache/{index}.txt", str(index))))


def workers(elsewhere: pathlib.Path) -> dict[str, object]:
    from torch.utils.data import DataLoader

    batches = [batch.tolist() for batch in DataLoader(_Written(), batch_size=2, num_workers=2)]  # type: ignore[arg-type]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=write, args=("from_child.txt", "child"))
    process.start()
    process.join()
    block = shared_memory.SharedMemory(create=True, size=16)
    block.buf[0] = 7
    twin = shared_memory.SharedMemory(block.name)
    shared = twin.buf[0]
    twin.close()
    block.close()
    block.unlink()
    return {
        "batches": batches,
        "written by workers": [text(f"cache/{index}.txt") for index in range(4)],
        "written by a fork": text("from_child.txt"),
        "shared memory": shared,
        "in /dev/shm": write(f"/dev/shm/upshift-test-{os.getpid()}", "s"),
        "cleaned": os.remove(f"/dev/shm/upshift-test-{os.getpid()}"),
        "null": pathlib.Path("/dev/null").write_text("x"),
    }


def children(elsewhere: pathlib.Path) -> dict[str, object]:
    """Writes past Python: what each gets back, not whether it may."""
    code = f"open({str(elsewhere / 'py.txt')!r}, 'w').write('py'); open('notes.txt', 'a').write('py')"
    python = subprocess.run([sys.executable, "-c", code], capture_output=True)
    shell = subprocess.run("echo sh > sh.txt && echo sh >> log.txt && rm ckpt_9.txt", shell=True, capture_output=True)
    return {
        "python": python.returncode == 0,
        "shell": shell.returncode == 0,
        "seen": [os.path.exists(path) for path in (elsewhere / "py.txt", "sh.txt", "ckpt_9.txt")],
        "temporary": subprocess.run("echo x > $(mktemp)", shell=True, capture_output=True).returncode == 0,
    }


def services(elsewhere: pathlib.Path) -> dict[str, object]:
    """A socket bound by another process before isolation."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect("service.sock")
    client.sendall(b"hello")
    return {"answer": client.recv(16).decode()}


def main() -> None:
    rung, scratch, keep, elsewhere, *stages = sys.argv[1:]
    from upshift.hook.isolate import enter

    start = time.perf_counter()
    isolation = enter(pathlib.Path(scratch), [pathlib.Path(keep)], None if rung == "auto" else rung)
    answer: dict[str, object] = {
        "rung": isolation.rung,
        "detail": isolation.detail,
        "seconds": time.perf_counter() - start,
        "cwd": os.getcwd() == str(HERE) == os.path.realpath("."),
    }
    for stage in stages:
        try:
            answer[stage] = globals()[stage](pathlib.Path(elsewhere))
        except Exception:
            answer[stage] = traceback.format_exc()
    kept = pathlib.Path(keep)
    (kept / "inner").mkdir()
    write(kept / "inner" / "record.txt", "kept")
    write(kept / "tmp.txt", "kept")
    os.replace(kept / "tmp.txt", kept / "final.txt")
    os.remove(kept / "old.txt")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
