"""`upshift run` without a plan behaves as `python` does: the same bits, streams, exit codes, names and tracebacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Ended, execute, often, python, upshift

from upshift.records.runfold import fold

SCRIPTS = Path(__file__).parent / "scripts"


def both(arguments: list[str], cwd: Path, runs: Path, **more: str) -> tuple[Ended, Ended]:
    """The same command line under `python` and under `upshift run`, side by side in time."""
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(python, *arguments, cwd=cwd, **more)
        hooked = pool.submit(upshift, "run", "--runs", str(runs), *arguments, cwd=cwd, **more)
        return plain.result(), hooked.result()


def same(plain: Ended, hooked: Ended) -> None:
    assert hooked.out == plain.out
    assert hooked.err == plain.err
    assert hooked.code == plain.code


def run_of(runs: Path):
    (folder,) = runs.iterdir()
    return fold(folder)


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Ended]:
    folder = tmp_path_factory.mktemp("zoo")
    return both([str(SCRIPTS / "zoo.py")], folder, folder / "runs")


KINDS = [
    "accumulation",
    "gan",
    "critics",
    "lbfgs",
    "double_precision",
    "several_roots",
    "backward_of_several",
    "functional",
    "loaders",
    "schedulers",
    "disabled_scaler",
    "double_backward",
    "copies",
    "teacher",
    "hooks",
    "tied_and_checkpointed",
    "frozen_norm",
    "seeds",
    "step_that_raises",
    "thread",
    "module_level",
    "random",
]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_parameters_have_the_same_bits(zoo, kind):
    plain, hooked = zoo
    expected = [line for line in plain.out.splitlines() if line.startswith(kind)]
    assert expected
    assert [line for line in hooked.out.splitlines() if line.startswith(kind)] == expected


def test_streams_of_the_zoo_are_the_same(zoo):
    plain, hooked = zoo
    assert plain.code == 0, plain.err
    same(plain, hooked)
    assert "lr_scheduler.step()" not in hooked.err


@pytest.mark.extra
def test_script_that_starts_processes(tmp_path):
    plain, hooked = both([str(SCRIPTS / "processes.py")], tmp_path, tmp_path / "runs")
    assert plain.code == 0, plain.err
    same(plain, hooked)
    assert run_of(tmp_path / "runs").steps == 12


def test_module_with_a_configurator(tmp_path):
    plain, hooked = both(["-m", "nano.train", "--steps=4", "--width=7"], SCRIPTS, tmp_path / "runs")
    assert plain.code == 0, plain.err
    same(plain, hooked)
    assert run_of(tmp_path / "runs").steps == 4


@pytest.mark.extra
def test_model_the_script_compiles(tmp_path):
    plain, hooked = both([str(SCRIPTS / "compiled.py")], tmp_path, tmp_path / "runs")
    assert plain.code == 0, plain.err
    same(plain, hooked)


# -- a process like any other -----------------------------------------------------------------------------------------

ABOUT = """
import sys
print(__name__, __file__, __spec__, __cached__, __package__, __doc__, type(__loader__).__name__, __annotations__)
print(sys.argv, sys.path[0], sorted(globals()), sys.modules["__main__"].__dict__ is globals(), type(__builtins__))
import os
print(os.getcwd(), sys.flags, sys.stdout.line_buffering, sorted(k for k in os.environ if "UPSHIFT" in k))
"""

ENDINGS = {
    "exit 3": ("import sys; print('a'); sys.exit(3)", 3),
    "exit 300": ("import sys; sys.exit(300)", 44),
    "exit text": ("import sys; sys.exit('what a pity')", 1),
    "exit none": ("import sys; sys.exit()", 0),
    "os exit": ("import os; os._exit(7)", 7),
    "exception": (
        "def f():\n  raise ValueError('no')\ntry:\n  f()\nexcept ValueError as e:\n  raise KeyError(1) from e",
        1,
    ),
    "group": ("raise ExceptionGroup('several', [ValueError(1), TypeError(2)])", 1),
    "syntax": ("x = = 2", 1),
    "import": ("import no_such_module_anywhere", 1),
    "interrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "terminated": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "atexit": ("import atexit; atexit.register(print, 'last'); print('first'); raise SystemExit(2)", 2),
    "excepthook": ("import sys\nsys.excepthook = lambda k, e, t: print('mine', k, t.tb_lineno)\nraise ValueError", 1),
    "stdin": ("print(input('? '), input())", 0),
    "warning": ("import warnings\ndef f():\n  warnings.warn('here', stacklevel=2)\nf()\nf()", 0),
    "thread": (
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('later'))).start()\nprint(1)",
        0,
    ),
    "thread fails": ("import threading\nt = threading.Thread(target=lambda: 1 / 0, name='t'); t.start(); t.join()", 0),
    "fork": ("import os\np = os.fork()\nif p: os.waitpid(p, 0)\nprint('parent' if p else 'child', flush=True)", 0),
    "closes files": ("import os\nos.closerange(3, 64)\nopen('own.txt', 'w').write('mine')\nprint(os.listdir('.'))", 0),
    "imports stdlib": ("import json, queue, select, tomllib\nprint(json.dumps({}), queue.Queue().qsize())", 0),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_behaves_as_under_python(tmp_path, name):
    source, code = ENDINGS[name]
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "train.py").write_text(source)
    plain, hooked = both(["train.py"], folder, tmp_path / "runs", stdin="one\ntwo\n")
    assert plain.code == code
    same(plain, hooked)


@pytest.mark.parametrize("path", ["train.py", "./train.py", "../script/train.py", "link.py", "train_without_suffix"])
def test_names_a_script_sees(tmp_path, path):
    folder, other = tmp_path / "script", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    for name in ("train.py", "train_without_suffix"):
        (folder / name).write_text(ABOUT)
    (other / "real.py").write_text(ABOUT)
    (folder / "link.py").symlink_to(other / "real.py")
    plain, hooked = both([path, "--plan", "x", "-q", "--", "a b"], folder, tmp_path / "runs")
    assert plain.code == 0, plain.err
    same(plain, hooked)


def test_safe_path_is_respected(tmp_path, write):
    write("helper.py", "")
    write("train.py", "import sys\nprint([p for p in sys.path if 'hook' in p])\nimport helper")
    plain, hooked = both(["train.py"], tmp_path, tmp_path / "runs", PYTHONSAFEPATH="1")
    assert plain.code == 1
    same(plain, hooked)


OWN = ["json", "queue", "msgspec", "tomllib", "select", "trial", "typing", "logging"]


@pytest.mark.parametrize("name", often(OWN, "json", "typing"))
def test_own_module_named_like_one_of_the_library(tmp_path, write, name):
    write(f"{name}.py", "mine = 'own module'\n__path__ = []")
    write("train.py", f"import {name}\nprint(getattr({name}, 'mine', None), {name}.__name__)")
    plain, hooked = both(["train.py"], tmp_path, tmp_path / "runs")
    assert "own module" in plain.out
    same(plain, hooked)


def test_folder_named_like_a_module_hides_nothing(tmp_path, write):
    write("logging/today.txt", "")
    write("train.py", "import logging\nprint(logging.getLogger('a').name)")
    same(*both(["train.py"], tmp_path, tmp_path / "runs"))


@pytest.mark.parametrize("name", ["no.such.module", "json", "bad..name", "train"])
def test_modules(tmp_path, write, name):
    write("train.py", "import sys\nprint(__spec__.name, __package__, sys.argv, __file__)\nraise SystemExit(4)")
    plain = python("-m", name, "a", cwd=tmp_path)
    hooked = upshift("run", "--runs", str(tmp_path / "runs"), "-m", name, "a", cwd=tmp_path)
    assert hooked.out == plain.out
    if name == "train":
        assert hooked.code == plain.code == 4
    else:
        assert plain.code == 1
        assert hooked.code == 2
        assert "Traceback" not in hooked.err


def test_interrupt_and_record(tmp_path, write):
    write("train.py", "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "upshift", "run", "--runs", str(tmp_path / "runs"), "train.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err and "upshift/hook" not in err
    assert run_of(tmp_path / "runs").status == "interrupted"


def test_killed_run_is_readable(tmp_path, write):
    source = """
        import os, signal, time, torch
        p = torch.nn.Parameter(torch.ones(2))
        o = torch.optim.SGD([p], lr=0.1)
        began = time.time()
        for i in range(10**9):
            p.square().sum().backward()
            o.step()
            if time.time() - began > 2.2:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    write("train.py", source)
    ended = upshift("run", "--runs", str(tmp_path / "runs"), "train.py", cwd=tmp_path)
    assert ended.code == -signal.SIGKILL
    run = run_of(tmp_path / "runs")
    assert run.status == "unknown" and run.steps > 10 and run.torn_lines == 0
    (folder,) = (tmp_path / "runs").iterdir()
    log = folder / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    assert fold(folder).torn_lines == 1


def test_record_is_private_and_holds_no_secrets(tmp_path, train):
    runs = tmp_path / "runs"
    ended = upshift(
        "run", "--runs", str(runs), "train.py", cwd=tmp_path, WANDB_API_KEY="s3cr3t-value", HF_TOKEN="t0ken"
    )
    assert ended.code == 0, ended.err
    (folder,) = runs.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "log.jsonl").stat().st_mode & 0o777 == 0o600
    for file in folder.iterdir():
        assert b"s3cr3t-value" not in file.read_bytes() and b"t0ken" not in file.read_bytes()
    run = fold(folder)
    assert run.steps == 5 and run.status == "finished" and run.exit_code == 0
    last = float(ended.out.splitlines()[-1].split()[1])
    assert run.windows[-1].last_loss == last
    assert sum(window.n for window in run.windows) == 5


@pytest.mark.extra
def test_training_in_a_thread_that_outlives_the_main_part(tmp_path, write):
    source = """
        import threading, time, torch
        def train():
            p = torch.nn.Parameter(torch.ones(2))
            o = torch.optim.SGD([p], lr=0.1)
            time.sleep(0.2)
            for i in range(30):
                p.square().sum().backward()
                o.step()
            print("done", p.tolist())
        threading.Thread(target=train).start()
    """
    write("train.py", source)
    plain, hooked = both(["train.py"], tmp_path, tmp_path / "runs")
    same(plain, hooked)
    assert run_of(tmp_path / "runs").steps == 30


def test_pipe_that_closes_early_ends_both_alike(tmp_path, write):
    write("train.py", "for i in range(10**5): print(i)")
    shell = "{} 2>err.txt | head -n 1"
    for command in (f"{sys.executable} train.py", f"{sys.executable} -m upshift run -q --runs runs train.py"):
        done = execute(["bash", "-c", shell.format(command) + "; exit ${PIPESTATUS[0]}"], tmp_path)
        assert done.out == "0\n"
        assert (tmp_path / "err.txt").read_text().splitlines()[-1] == "BrokenPipeError: [Errno 32] Broken pipe"


@pytest.mark.extra
def test_quiet_says_nothing(tmp_path, train):
    ended = upshift("run", "-q", "--no-plan", "train.py", cwd=tmp_path)
    assert ended.said == () and ended.err == "" and ended.code == 0


def test_descriptor_of_the_log_is_not_inherited(tmp_path, write):
    write("train.py", "import subprocess, sys\nsubprocess.run(['ls', '-l', '/proc/self/fd'], close_fds=False)")
    ended = upshift("run", "train.py", cwd=tmp_path)
    assert ended.code == 0 and "log.jsonl" not in ended.out


def test_time_of_start(tmp_path, write):
    """Not a benchmark: only that nothing heavy (torch, a probe) is loaded for a script that does not ask for it."""
    write("train.py", "import sys\nprint('torch' in sys.modules, 'numpy' in sys.modules, 'jinja2' in sys.modules)")
    began = time.monotonic()
    ended = upshift("run", "train.py", cwd=tmp_path)
    assert ended.out == "False False False\n"
    assert time.monotonic() - began < 60
    assert os.listdir(tmp_path / ".upshift") == ["runs"]
