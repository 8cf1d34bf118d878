"""Common kinds of scripts, untouched, through the real commands: the same bits, every step seen, reasons given.

Without a mark only the most different kinds are run; `make kinds` runs all of them.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import UPSHIFT, Ended, execute, python, upshift
from kinds import BIN, FOLDER, GROUPS, KINDS, Group, Kind, assert_same, contents, write_plan

from upshift.records import Measurement, codec
from upshift.records.runfold import fold
from upshift.records.runlog import LOG
from upshift.search.candidates import candidates
from upshift.techniques import registry

pytestmark = pytest.mark.kinds


def every(table: dict, part: str) -> list:
    """All kinds of a table; those that are not run always are marked, those without their package skipped."""
    found = []
    for name, kind in table.items():
        missing = importlib.util.find_spec(kind.package) is None
        marks = [] if part in getattr(kind, "always", ()) else [pytest.mark.extra]
        marks.append(pytest.mark.skipif(missing, reason=f"{kind.package} is not installed"))
        found.append(pytest.param(kind, id=name, marks=marks))
    return found


def folders(tmp_path: Path, *names: str) -> list[Path]:
    found = [tmp_path / name for name in names]
    for folder in found:
        folder.mkdir()
    return found


def lines(ended: Ended) -> list[str]:
    """What was printed; processes print in any order."""
    return sorted(ended.out.splitlines())


def records(folder: Path) -> list:
    """The runs recorded below a folder that trained."""
    runs = [fold(path.parent) for path in folder.rglob(LOG)]
    return [run for run in runs if run.steps]


@pytest.mark.parametrize("kind", every(KINDS, "run"))
def test_the_run_is_the_scripts_own(tmp_path: Path, kind: Kind) -> None:
    stock, hooked, planned = folders(tmp_path, "stock", "hooked", "planned")
    script = FOLDER / kind.script
    plan = write_plan(tmp_path / "plan.toml", script, kind.arguments, kind.plan)
    line = [str(script), *kind.arguments]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(python, *line, cwd=stock)
        second = pool.submit(upshift, "run", "--no-plan", "--runs", "runs", *line, cwd=hooked)
        third = pool.submit(upshift, "run", "--plan", str(plan), "--runs", "runs", *line, cwd=planned)
        plain, watched, changed = first.result(), second.result(), third.result()
    assert plain.code == 0, plain.err
    expected = contents(stock, kind.files)
    for folder, ended in ((hooked, watched), (planned, changed)):
        assert ended.code == 0, ended.err
        assert ended.out == plain.out
        assert_same(contents(folder, kind.files), expected)
        (run,) = records(folder / "runs")
        assert run.steps == kind.steps and run.guard_fired is False
    said = "".join(changed.said)
    for words in kind.says:
        assert words in said, said


@pytest.mark.parametrize("kind", every(KINDS, "diagnose"))
def test_its_step_is_taken_apart(tmp_path: Path, kind: Kind) -> None:
    line = ("diagnose", "-q", "--no-probe", "--seconds", "60s", "--json", "seen.json")
    done = upshift(*line, str(FOLDER / kind.script), *kind.arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    seen = codec.read(tmp_path / "seen.json", Measurement)
    step = seen.anatomy
    assert step.steps_seen == kind.steps
    values = [phase.seconds.value for phase in step.phases if phase.seconds.known]
    assert sum(values) == pytest.approx(step.step.value, rel=1e-6)
    assert all(value > 0 for value in values), step.phases
    assert all(phase.note for phase in step.phases if not phase.seconds.known)
    for total in (step.evaluation, step.checkpointing):
        assert not total.known or total.value > 0
    if kind.batches is None:
        assert step.micro_batches.value > 1
    else:
        assert step.micro_batches.value == kind.batches
    assert len(seen.facts.optimizers) == kind.optimizers
    assert not any(path.name != "seen.json" for path in tmp_path.iterdir())
    assert kind.metric in " ".join(seen.notes)
    tried, refused = candidates(registry.all_techniques(), seen)
    assert all(item.reason for item in tried) and all(trial.reason for trial in refused)
    assert {item.name for item in tried} | {trial.name for trial in refused} == set(registry.names())


@pytest.mark.parametrize("group", every(GROUPS, "run"))
def test_several_processes(tmp_path: Path, group: Group) -> None:
    stock, hooked, planned = folders(tmp_path, "stock", "hooked", "planned")
    command = [*group.command, str(FOLDER / group.script)]
    prefix = ["--", *command] if group.launched else command
    target = FOLDER / ("timm_style.py" if group.script == "job.sh" else group.script)
    plan = write_plan(tmp_path / "plan.toml", target, (), group.plan)
    own = {"PATH": f"{BIN}:/usr/bin:/bin"}
    start = command if group.launched else [str(BIN / "python"), *command]
    run = [UPSHIFT, "run", "--runs", "runs"]
    plain = execute(start, stock, **own)
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(execute, [*run, "--no-plan", *prefix], hooked, **own)
        third = pool.submit(execute, [*run, "--plan", str(plan), "--allow-stale", *prefix], planned, **own)
        watched, changed = second.result(), third.result()
    assert plain.code == 0, plain.err
    expected = contents(stock, group.files)
    for folder, ended in ((hooked, watched), (planned, changed)):
        assert ended.code == 0, ended.err
        assert lines(ended) == lines(plain)
        assert_same(contents(folder, group.files), expected)
        assert tuple(item.steps for item in records(folder / "runs")) == group.steps
    said = "".join(changed.said)
    for words in group.says:
        assert words in said, said
    refused = execute([UPSHIFT, "diagnose", "-q", "--no-probe", *prefix], tmp_path, **own)
    assert refused.code in (2, 4) and group.refused in refused.err + "".join(refused.said)
