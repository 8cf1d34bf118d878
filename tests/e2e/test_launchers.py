"""`upshift run -- COMMAND`: the command is started as it is, and what trains below it is recorded, rank by rank."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import UPSHIFT, Ended, execute, upshift

from upshift.api import Target, latest_run, load
from upshift.errors import RecordError
from upshift.hardware.device import device_name
from upshift.records import Plan, Proof, Run, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept
from upshift.records.runfold import fold
from upshift.records.runlog import LOG

SCRIPTS = Path(__file__).parent / "scripts"
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--standalone")

Write = Callable[[str, str], Path]


def side_by_side(command: list[str], cwd: Path, **more: str) -> tuple[Ended, Ended]:
    """A command by itself, and below `upshift run`."""
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(execute, command, cwd, **more)
        hooked = pool.submit(upshift, "run", "--runs", str(cwd / "runs"), "--", *command, cwd=cwd, **more)
        return plain.result(), hooked.result()


def records(runs: Path) -> dict[str, Run]:
    """Folder relative to the run -> what was recorded there."""
    (launch,) = runs.iterdir()
    return {str(path.parent.relative_to(launch)): fold(path.parent) for path in launch.rglob(LOG)}


def lines(ended: Ended) -> list[str]:
    return sorted(ended.out.splitlines())


def plan_for(script: Path, arguments: tuple[str, ...] = ()) -> None:
    techniques = {"allocator": {}, "fused": {"kind": "fused"}}
    device = device_name("cpu")
    planfile.write(
        script.with_suffix(".upshift.toml"),
        Plan(
            script=script.name, arguments=arguments, created="2026-01-01 00:00:00", device=device, verdict="",
            fingerprint=fingerprint(str(script), arguments, device, techniques), speedup=1.2,
            proof=Proof(rung="trajectory", passed=True, reason=""),
            kept=tuple(Kept(name=name, settings=settings) for name, settings in techniques.items()),
        ),
    )  # fmt: skip


# -- torchrun ---------------------------------------------------------------------------------------------------------


def test_two_ranks_without_a_plan_have_the_same_bits_and_a_record_each(tmp_path: Path) -> None:
    plain, hooked = side_by_side([*TORCHRUN, str(SCRIPTS / "ddp.py")], tmp_path)
    assert plain.code == hooked.code == 0, hooked.err
    assert lines(hooked) == lines(plain) and len(lines(plain)) == 14
    found = records(tmp_path / "runs")
    assert sorted(found) == ["rank0", "rank1"]
    assert latest_run(tmp_path / "runs").name == "rank0"
    with pytest.raises(RecordError, match="rank0, rank1"):
        load(latest_run(tmp_path / "runs").parent)
    for number, run in enumerate(found[name] for name in sorted(found)):
        assert run.steps == sum(window.n for window in run.windows) == 6
        assert (run.status, run.exit_code, run.techniques) == ("finished", 0, {})
        assert f"{number} 5 {run.windows[-1].last_loss!r}" in plain.out
        for phase in ("forward", "backward", "optimizer"):
            seconds = sum(window.phases[phase] for window in run.windows)
            assert 0 < seconds < sum(window.seconds for window in run.windows)
    assert sum(line.startswith("upshift: rank 1: 6 steps") for line in hooked.said) == 1


def test_the_plan_of_the_script_acts_in_each_rank_and_comes_off_with_the_rank_named(tmp_path: Path) -> None:
    shutil.copy(SCRIPTS / "ddp.py", tmp_path)
    plan_for(tmp_path / "ddp.py", ("--poison", "1"))
    command = ["run", "--runs", "runs", "--", *TORCHRUN, "ddp.py", "--poison", "1"]
    hooked = upshift(*command, cwd=tmp_path)
    assert hooked.code == 0, hooked.err
    found = records(tmp_path / "runs")
    assert [found[name].guard_fired for name in ("rank0", "rank1")] == [True, True]
    assert set(found["rank0"].techniques) == {"allocator", "fused"} and found["rank0"].steps == 6
    said = "".join(hooked.said)
    assert "upshift: rank 1: guard: step 4: the loss is inf" in said
    assert "upshift: rank 0: guard: step 5: the loss is nan" in said
    assert "upshift: rank 0: applied fused" in said and "upshift: rank 1: applied fused" in said
    # The ranks share a gradient: none of them may skip the update, or they part for good.
    assert {"0 nan", "1 nan"} < set(lines(hooked))


# -- other commands ---------------------------------------------------------------------------------------------------


@pytest.mark.extra
def test_a_shell_script_starts_several_programs(tmp_path: Path, train: Path, write: Write) -> None:
    write("own/sitecustomize.py", "import sys\nsys.mine = [item for item in sys.path if 'below' in item]")
    write("package/__init__.py", "")
    write(
        "package/fit.py",
        # Looking for torch is not importing it.
        "import importlib.util, sys; print(importlib.util.find_spec('torch').name, sys.mine, sys.argv[1:])\n"
        + train.read_text()
        + "raise SystemExit(3)",
    )
    write("helper.py", "import torch, sys; print(torch.ones(2).sum().item(), sys.stdin.read())")
    write("job.sh", f"P={sys.executable}\n$P -um package.fit a b\necho $?\n$P helper.py\n$P train.py\nexit 9")
    plan_for(train)
    plain, hooked = side_by_side(["sh", "job.sh"], tmp_path, stdin="words", PYTHONPATH="own")
    assert plain.code == hooked.code == 9
    assert "torch [] ['a', 'b']" in plain.out and "2.0 words" in plain.out
    fit, helper, again = (lines(plain)[i] == lines(hooked)[i] for i in (0, -2, -1))
    assert fit and helper and again
    assert hooked.err == plain.err
    found = sorted(records(tmp_path / "runs").values(), key=lambda run: run.started)
    assert [(run.script, run.arguments, run.steps) for run in found] == [
        ("package.fit", ("a", "b"), 5),
        ("train.py", (), 5),
    ]
    assert [set(run.techniques) for run in found] == [set(), {"allocator", "fused"}]
    assert all(run.id.isdigit() for run in found)
    assert any("no effect allocator: it acts on the environment" in line for line in hooked.said)


def test_the_process_is_the_command(tmp_path: Path) -> None:
    waits = "import os, time; print('ready', os.getpid(), flush=True); time.sleep(60)"
    command = [UPSHIFT, "run", "-q", "--", sys.executable, "-c", waits]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"ready {process.pid}\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err and "upshift" not in err
    assert records(tmp_path / ".upshift" / "runs") == {}


@pytest.mark.parametrize(
    ("name", "first", "command"),
    [
        ("train.py", "#!/bin/sh", False),
        ("train", "#!/usr/bin/env python3", False),
        ("torchrun", "#!/somewhere/bin/python", True),
        ("launch", "#!/bin/bash", True),
    ],
)
def test_what_is_taken_for_a_command(write: Write, name: str, first: str, command: bool) -> None:
    file = write(name, f"{first}\n")
    assert not Target(str(file)).starts_others
    file.chmod(0o755)
    assert Target(str(file)).starts_others is command


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["diagnose", "torchrun", "a.py", "--x"], 2, "only upshift run follows"),
        (["tune", "--", "sh", "a.sh"], 2, "Name the training script itself: train.py"),
        (["run", "--", "no-such-command-anywhere"], 2, "there is no script no-such-command-anywhere"),
        (["run", "--plan", "none.toml", "--", "sh", "a.sh"], 3, "there is no plan none.toml"),
        (["run", "--", "./not-a-program"], 2, "cannot be started"),
    ],
)
def test_refusals(tmp_path: Path, write: Write, arguments: list[str], code: int, words: str) -> None:
    write("not-a-program", "what").chmod(0o755)
    ended = upshift(*arguments, cwd=tmp_path, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert ended.code == code
    assert words in "".join(ended.said) + ended.err


# -- children of one script -------------------------------------------------------------------------------------------


@pytest.mark.extra
def test_children_that_train_are_recorded_and_no_others(tmp_path: Path) -> None:
    script = str(SCRIPTS / "children.py")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(execute, [sys.executable, script, "serial"], tmp_path)
        second = pool.submit(upshift, "run", "--runs", str(tmp_path / "runs"), script, cwd=tmp_path)
        serial, hooked = first.result(), second.result()
    assert serial.code == hooked.code == 0, hooked.err
    assert set(lines(serial)) | {"4 idle 2.0", "forked 6", "codes [0, 0, 5, 0]"} == set(lines(hooked))
    assert "upshift" not in hooked.err and "touched" not in hooked.err
    found = records(tmp_path / "runs")
    parent = found.pop(".")
    assert parent.steps == 0 and any(event.kind == "children" for event in parent.events)
    assert "4 of its processes trained" in hooked.said[-1]
    assert len(found) == 4 and all(run.steps == 5 and run.id.isdigit() for run in found.values())
    assert sorted(run.exit_code for run in found.values()) == [0, 0, 5, 6]
    losses = {line.split()[1] for line in lines(serial)}
    assert {repr(run.windows[-1].last_loss) for run in found.values()} == losses
