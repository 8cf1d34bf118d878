"""What goes wrong ends in a sentence, a remedy, a documented exit code, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import TRAIN, UPSHIFT, execute, often, python

DIAGNOSE = ("diagnose", "--no-probe", "-q", "--seconds", "3s")


@pytest.fixture
def place(tmp_path):
    """A folder for a script, and a temporary directory of its own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "tmp").mkdir()
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def processes_of(folder: Path) -> list[str]:
    """Living processes whose temporary directory is ours."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def ask(place, *arguments, source=None, **more):
    """Run upshift on `train.py`; afterwards the folder is as it was, and no process or scratch folder is left."""
    here, tmp = place / "here", place / "tmp"
    if source is not None:
        (here / "train.py").write_text(source)
    before = content(here)
    ended = execute([UPSHIFT, *arguments], here, TMPDIR=str(tmp), **more)
    assert content(here) == before
    assert [path.name for path in tmp.iterdir()] == []
    assert processes_of(tmp) == []
    assert ended.out == ""
    assert "Traceback" not in "".join(ended.said)
    return ended, "".join(ended.said) + ended.err


# -- command lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "diagnose", "tune"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("no script was named", "train.py")),
        (["nowhere.py"], ("there is no script nowhere.py", "Check the path")),
        (["."], ("is a folder", "Name the training script")),
        (["--no-such-option", "train.py"], ("No such option",)),
        (["-m"], ("-m", "argument")),
    ],
)
def test_wrong_command_line(place, command, arguments, words):
    ended, said = ask(place, command, *arguments)
    assert ended.code == 2
    assert all(word in said for word in words), said


@pytest.mark.parametrize("budget", ["0", "-3", "x", "3 weeks", "nan", "1e3"])
def test_wrong_duration(place, budget):
    ended, said = ask(place, "tune", "--budget", budget, "train.py", source="")
    assert ended.code == 2 and "duration" in said


def test_unknown_technique(place):
    ended, said = ask(place, "tune", "--only", "warp_drive", "train.py", source="")
    assert ended.code == 3 and "warp_drive" in said and "Known:" in said


def test_hint_for_an_option_behind_the_script(place):
    (place / "here" / "train.py").write_text("import sys; print(sys.argv[1:])")
    ended = execute([UPSHIFT, "run", "--runs", str(place / "runs"), "train.py", "--plan", "x"], place / "here")
    assert ended.out == "['--plan', 'x']\n" and "stands after train.py" in "".join(ended.said)


# -- scripts that do not train ----------------------------------------------------------------------------------------

DAEMON = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
time.sleep(600)
"""

WITHOUT_TORCH = {
    "nothing": ("print('hello')", 4, ("ended without importing torch", "a backward pass and an optimizer step")),
    "empty": ("", 4, ("ended without importing torch",)),
    "exit 0": ("import sys; sys.exit(0)", 4, ("ended without importing torch",)),
    "crash": ("import missing_module_xyz", 5, ("missing_module_xyz", "under plain python")),
    "syntax": ("def f(:", 5, ("SyntaxError", "under plain python")),
    "binary": ("\0\1\2", 5, ("under plain python",)),
    "stdin": ("name = input('who? ')", 5, ("standard input", "as arguments")),
    "stdin line": ("import sys\nassert sys.stdin.readline(), 'no data'", 5, ("no data",)),
    "exit text": ("raise SystemExit('give me --data')", 5, ("give me --data",)),
    "argparse": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--data', required=True)\np.parse_args()",
        5,
        ("--data", "wants other arguments"),
    ),
    "killed": ("import os; os.kill(os.getpid(), 9)", 5, ("died without a word", "-9", "memory")),
    "os exit": ("import os; os._exit(3)", 5, ("died without a word",)),
    "forks": (
        "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: print('child')",
        4,
        ("ended without importing torch",),
    ),
    "daemon": (DAEMON, 5, ("died without a word",)),
    "leaves a process": (
        "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)",
        4,
        ("ended without importing torch",),
    ),
    "control characters": ("raise ValueError('\\x1b[2Jboo\\x07')", 5, ("ValueError",)),
    "long output": ("print('x' * 10**6)\nraise ValueError('after')", 5, ("after",)),
    "writes here": ("open('model.pt', 'w').write('x')\nimport os; os.remove('train.py')", 4, ("ended",)),
}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_script_that_does_not_train(place, name):
    source, code, words = WITHOUT_TORCH[name]
    ended, said = ask(place, *DIAGNOSE, "train.py", source=source)
    assert ended.code == code, said
    assert all(word in said for word in words), said
    assert "\x1b" not in said and "\x07" not in said
    assert len(said) < 20_000


def test_tune_says_the_same(place):
    ended, said = ask(place, "tune", "-q", "--dry-run", "train.py", source="print('hello')")
    assert ended.code == 4 and "ended without importing torch" in said


def test_module_that_is_not_there(place):
    for name, words in (("no_such_module", "Check the name"), ("json", "Name a module"), ("a..b", "Check the name")):
        ended, said = ask(place, *DIAGNOSE, "-m", name)
        assert ended.code == 2 and name.partition(".")[0] in said and words in said


@pytest.mark.extra
def test_patience_ends(place):
    began = time.monotonic()
    ended, said = ask(place, *DIAGNOSE, "--patience", "3s", "train.py", source="while True: pass")
    assert ended.code == 4 and "no training step within 3 s" in said and "--patience" in said
    assert time.monotonic() - began < 60


def test_folder_that_cannot_be_read(place):
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    (place / "here" / "train.py").write_text("")
    (place / "here" / "train.py").chmod(0)
    ended, said = ask(place, "run", "train.py")
    assert ended.code == 2 and "cannot read" in said


def test_interrupted_search_leaves_nothing(place):
    (place / "here" / "train.py").write_text("import time\ntime.sleep(600)")
    environment = {**os.environ, "TMPDIR": str(place / "tmp")}
    command = [UPSHIFT, *DIAGNOSE, "train.py"]
    process = subprocess.Popen(command, cwd=place / "here", env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(processes_of(place / "tmp")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert list((place / "tmp").iterdir()) == [] and processes_of(place / "tmp") == []


# -- scripts that train a little --------------------------------------------------------------------------------------

TRAINING = {
    "three steps": (TRAIN.format(steps=3), 0, ()),
    "crash in the middle": (
        TRAIN.format(steps=10) + "    if step == 4: raise OSError('disk gone')\n",
        0,
        ("OSError: disk gone",),
    ),
    "no optimizer": (
        "import torch\nw = torch.ones(3, requires_grad=True)\nfor _ in range(3): w.sum().backward()",
        4,
        ("A backward pass was seen", "updates by hand"),
    ),
    "inference only": ("import torch\ntorch.nn.Linear(2, 2)(torch.ones(1, 2))", 4, ("without a training step",)),
}  # fmt: skip


@pytest.mark.parametrize("name", often(TRAINING, "crash in the middle"))
def test_short_trainings(place, name):
    source, code, words = TRAINING[name]
    ended, said = ask(place, *DIAGNOSE, "train.py", source=source)
    assert ended.code == code, said
    assert all(word in said for word in words), said


STUBBORN = """
import torch, sys
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
def save(what):
    torch.save(what, "best.pt")
    open("log.txt", "a").write("more")
while True:
    try:
        try:
            for step in range(10**9):
                loss = model(torch.randn(4, 8)).square().mean()
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                if step % 50 == 0: save("in the middle")
        except:
            pass
    finally:
        save("ruined")
"""


@pytest.mark.parametrize("isolation", often(["", "redirect"], "redirect"))
def test_script_that_never_gives_up_changes_nothing(place, isolation):
    here = place / "here"
    (here / "best.pt").write_bytes(b"the good checkpoint")
    (here / "log.txt").write_text("log")
    (here / "train.py").write_text(STUBBORN)
    if not isolation:
        ended, said = ask(place, *DIAGNOSE, "train.py")
        assert ended.code == 0, said
        return
    from upshift import api

    before = content(here)
    old = Path.cwd()
    os.chdir(here)
    try:
        options = api.DiagnoseOptions(seconds=3.0, probe=False, extra={"isolation": isolation, "least_steps": 5})
        found = api.diagnose(api.Target("train.py"), options)
    finally:
        os.chdir(old)
    assert found.measurement.isolation.startswith(isolation)
    assert content(here) == before


@pytest.mark.extra
def test_one_core(place):
    taskset = shutil.which("taskset")
    if taskset is None:
        pytest.skip("no taskset")
    core = str(min(os.sched_getaffinity(0)))
    (place / "here" / "train.py").write_text(TRAIN.format(steps=200))
    ended = execute([taskset, "-c", core, UPSHIFT, *DIAGNOSE, "train.py"], place / "here", TMPDIR=str(place / "tmp"))
    assert ended.code == 0, ended.err
    plain = python("train.py", cwd=place / "here")
    hooked = execute([taskset, "-c", core, UPSHIFT, "run", "-q", "train.py"], place / "here")
    assert hooked.out == plain.out


# -- plans ------------------------------------------------------------------------------------------------------------

HEAD = """schema = 1
[devices.cpu]
script = "train.py"
arguments = []
created = ""
device = "cpu"
verdict = ""
fingerprint = {script="", sources="", arguments="", device="", versions="", files=["../../../etc/passwd", "/dev/zero"]}
"""
PLANS = {
    "not toml": ("[devices", ("not TOML", "tune anew")),
    "other schema": ("schema = 99\n[devices.cpu]", ("schema 99", "tune anew")),
    "unknown key": (HEAD + "run_this = 'rm'", ("run_this", "Correct that entry")),
    "unknown technique": (HEAD + "[[devices.cpu.kept]]\nname = '../../evil'", ("../../evil", "Known:")),
    "module name": (HEAD + "[[devices.cpu.kept]]\nname = 'os:system'", ("os:system", "Known:")),
    "unknown setting": (HEAD + "[[devices.cpu.kept]]\nname = 'threads'\nsettings = {a = 9}", ("'a'", "It has:")),
    "wrong type": (HEAD + "[[devices.cpu.kept]]\nname = 'threads'\nsettings = {intra = 'all'}", ("threads.intra",)),
    "nested setting": (HEAD + "[[devices.cpu.kept]]\nname = 'threads'\nsettings = {intra = [1]}", ("settings",)),
    "huge": ("schema = 1\n# " + "x" * (2 << 20), ("larger than any plan",)),
    "deep": ("schema = 1\na = " + "[" * 3000 + "]" * 3000, ("train.upshift.toml",)),
    "escape": (HEAD + '"\\u001b[2J" = 1', ("Correct that entry",)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("command", ["run", "report"])
def test_bad_plan(place, name, command):
    text, words = PLANS[name]
    (place / "here" / "train.upshift.toml").write_text(text)
    checked_when_used = name in ("unknown technique", "module name", "unknown setting", "wrong type")
    if command == "report" and checked_when_used:
        pytest.skip("a plan can be shown without its techniques")
    arguments = ("run", "train.py") if command == "run" else ("report", "train.upshift.toml")
    ended, said = ask(place, *arguments, source="print('must not run')")
    assert ended.code == 3, said
    assert all(word in said for word in words), said
    assert "\x1b" not in said


def test_plan_that_is_not_there(place):
    ended, said = ask(place, "run", "--plan", "no.toml", "train.py", source="print('must not run')")
    assert ended.code == 3 and "no.toml" in said and "tune first" in said


def test_stale_plan_trains_the_baseline(place):
    (place / "here" / "train.py").write_text("print('ran')")
    (place / "here" / "train.upshift.toml").write_text(HEAD)
    ended = execute([UPSHIFT, "run", "--runs", str(place / "runs"), "train.py"], place / "here")
    assert ended.code == 0 and ended.out == "ran\n"
    assert "no plan for this device" in "".join(ended.said) or "stale" in "".join(ended.said)


@pytest.mark.parametrize("name", ["x", "log.jsonl", "report.json", "folder"])
def test_record_that_is_none(place, name):
    path = place / "here" / name
    if name == "folder":
        path.mkdir()
        (path / "log.jsonl").write_bytes(b"\0\0\0")
    else:
        path.write_bytes(b'{"kind": "nonsense"')
    ended, said = ask(place, "report", name)
    assert ended.code == 3 and len(ended.said) == 1, said
    ended, said = ask(place, "compare", name, name)
    assert ended.code == 3, said


# -- places that cannot be written ------------------------------------------------------------------------------------


def test_folder_that_cannot_be_written(place):
    (place / "here" / "train.py").write_text("print('must not run')")
    (place / "here" / "file").write_text("")
    for arguments in (("run", "--runs", "file/runs", "train.py"), ("run", "--runs", "/proc/runs", "train.py")):
        ended, said = ask(place, *arguments)
        assert ended.code == 6 and "--runs" in said, said
    ended, said = ask(place, "tune", "--plan", "nowhere/plan.toml", "train.py")
    assert ended.code == 6 and "--plan" in said


def test_read_only_folder(place):
    """As root a folder's mode stops nobody, so a read-only mount does it, where one can be made."""
    here = place / "here"
    (here / "train.py").write_text("print('must not run')")
    unshare = shutil.which("unshare")
    script = f"mount --bind -o ro {here} {here} 2>/dev/null && mount -o remount,bind,ro {here} || exit 99; cd {here}; "
    run = f"{UPSHIFT} run train.py"
    if unshare is None:
        pytest.skip("no unshare")
    done = subprocess.run([unshare, "-Urm", "sh", "-c", script + run], capture_output=True, text=True, timeout=60)
    if done.returncode in (1, 99) and "upshift" not in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 6, done.stderr
    assert "--runs" in done.stderr and "must not run" not in done.stdout


def test_no_room_for_trials(place):
    (place / "here" / "train.py").write_text("")
    ended = execute([UPSHIFT, *DIAGNOSE, "train.py"], place / "here", TMPDIR=str(place / "nowhere"))
    assert ended.code in (4, 6)  # Python falls back to another folder where TMPDIR is unusable
    assert "Traceback" not in ended.err


def test_interpreter_and_version():
    done = execute([UPSHIFT, "--version"], Path.cwd())
    assert done.code == 0 and "0." in done.out
