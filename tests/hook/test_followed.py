"""Processes upshift did not start itself: what they run, and where their records lie."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import pytest

from upshift.hook.followed import LateLog
from upshift.hook.imports import AfterImport
from upshift.hook.launched import started
from upshift.records.runfold import fold


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python train.py -m x", ("train.py", False)),
        ("python -u train.py", ("train.py", False)),
        ("python -m package.train --x", ("package.train", True)),
        ("python -uBm package.train", ("package.train", True)),
        ("python -mpackage -c", ("package", True)),
        ("python -X dev -Wignore -W error a/b.py", ("a/b.py", False)),
        ("python --check-hash-based-pycs always t.py", ("t.py", False)),
        ("python -Ic code", ("-c", False)),
        ("python -", ("-", False)),
        ("python", ("-", False)),
    ],
)
def test_what_an_interpreter_was_started_with(command, expected):
    assert started(command.split()) == expected


def open_log(folder):
    log = LateLog(folder, lambda: None)
    log.append("start", script="train.py", arguments=[], started="now")
    assert list(folder.iterdir()) == []
    log.append("steps", first=0, n=3, at=1.0, seconds=0.5)
    log.close()
    return log


def test_a_restarted_rank_gets_a_record_of_its_own(tmp_path, monkeypatch):
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "7")
    (tmp_path / "a").mkdir()
    assert open_log(tmp_path / "a").folder.name == "rank7"
    (tmp_path / "b" / "rank7").mkdir(parents=True)
    late = LateLog(tmp_path / "b", lambda: None)
    late.append("start", script="train.py", arguments=[], started="now")
    late.append("steps", first=0, n=3, at=1.0, seconds=0.5)
    late.close()
    assert late.folder.name == f"rank7-{os.getpid()}"
    assert fold(late.folder).steps == fold(tmp_path / "a" / "rank7").steps == 3


def test_a_record_that_cannot_be_made_is_said_and_costs_nothing_else(tmp_path):
    (tmp_path / "runs").write_text("a file")
    told = []
    log = LateLog(tmp_path / "runs", lambda: told.append("open"))
    log.append("steps", first=0, n=1, at=1.0, seconds=0.5)
    log.append("steps", first=1, n=1, at=1.0, seconds=0.5)
    log.close()
    assert "cannot be written" in log.broken and told == ["open"]


def test_looking_for_a_module_is_not_importing_it(tmp_path, monkeypatch):
    (tmp_path / "looked_for.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    imports = AfterImport()
    imports.on("looked_for", lambda module: seen.append(module.value))
    imports.on("looked_for", lambda module: seen.append(module.__name__))
    assert importlib.util.find_spec("looked_for") is not None and seen == []
    importlib.import_module("looked_for")
    assert seen == [1, "looked_for"]
    assert imports not in sys.meta_path
