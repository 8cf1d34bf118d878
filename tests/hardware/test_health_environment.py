"""The Python environment: interpreters that differ, packages that leak in, torch twice; and all checks at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from upshift.hardware.health import build, environment, look, whole
from upshift.hardware.health.build import TorchFacts
from upshift.hardware.health.check import Ran


@pytest.mark.parametrize(
    ("version", "implementation", "bits", "free", "state"),
    [((3, 12), "CPython", 64, False, "ok"), ((3, 10), "CPython", 64, False, "wrong"),
     ((3, 12), "PyPy", 64, False, "wrong"), ((3, 12), "CPython", 32, False, "wrong"),
     ((3, 14), "CPython", 64, True, "note")],
)  # fmt: skip
def test_python(version, implementation, bits, free, state):
    found = environment.python(version, implementation, bits, free)
    assert found.state == state and bool(found.mend) == (state != "ok")


def test_the_python_of_the_tests():
    assert environment.python_here().state in ("ok", "note")


@pytest.mark.parametrize(
    ("env", "command", "other", "state", "said"),
    [
        ({}, "/e/bin/python", "/e", "ok", "/e"),
        ({"VIRTUAL_ENV": "/e"}, "/e/bin/python", "/e", "ok", "/e"),
        ({"CONDA_PREFIX": "/e"}, "/e/bin/python", "/e", "ok", "/e"),
        ({"CONDA_PREFIX": "/conda", "VIRTUAL_ENV": "/e"}, "/e/bin/python", "/e", "ok", "/e"),
        ({"CONDA_PREFIX": "/conda"}, "/conda/bin/python", "/conda", "note", "CONDA_PREFIX is /conda"),
        ({"VIRTUAL_ENV": "/other"}, "/other/bin/python", "/other", "note", "VIRTUAL_ENV is /other"),
        ({}, "/usr/bin/python", "/usr", "note", "`python` is /usr/bin/python"),
        ({}, None, None, "ok", "no `python`"),
        ({}, "/broken/python", None, "unknown", "/broken/python"),
    ],
)
def test_environments_that_are_mixed_up(env, command, other, state, said):
    found = environment.active(env, "/e", command, other)
    assert found.state == state and said in found.found and bool(found.mend) == (state == "note")


def test_where_another_interpreter_lives(tmp_path):
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert environment.prefix_of(str(Path(sys.executable)), sys.executable, "/own") == "/own", "not asked"
    asked = environment.prefix_of("/usr/x/python", sys.executable, "/own", lambda command, seconds: Ran(0, "hi\n/p\n"))
    assert asked == "/p"
    for failed in (Ran(1, "/p"), Ran(0, ""), Ran(None, problem="late")):
        assert environment.prefix_of("/x/python", sys.executable, "/o", lambda command, s, ran=failed: ran) is None
    shim = tmp_path / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    shim.chmod(0o755)
    assert environment.prefix_of(str(shim), sys.executable, "/own") == sys.prefix


@pytest.mark.parametrize(
    ("env", "user", "own", "mend"),
    [({}, None, True, ""), ({"PYTHONPATH": "/ros"}, None, True, "unset PYTHONPATH"),
     ({"PYTHONHOME": "/x"}, None, True, "unset PYTHONHOME"), ({"PYTHONPATH": ""}, None, True, ""),
     ({}, "/home/me/.local", True, "export PYTHONNOUSERSITE=1"), ({}, "/home/me/.local", False, "")],
)  # fmt: skip
def test_packages_from_outside(env, user, own, mend):
    found = environment.leaks(env, user, own)
    assert found.mend == mend and found.state == ("note" if mend else "ok")


def installed(folder: Path, version: str, name: str = "torch") -> str:
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def test_torch_installed_twice(tmp_path):
    first, second = installed(tmp_path / "a", "2.13.0"), installed(tmp_path / "b", "2.9.1")
    installed(tmp_path / "a", "0.28.0", "torchvision")
    one = environment.distributions(path=[first, first])
    assert [version for version, _ in one] == ["2.13.0"], "the same folder counts once"
    two = environment.distributions(path=[first, second])
    assert [version for version, _ in two] == ["2.13.0", "2.9.1"]
    found = environment.twice(two)
    assert found is not None and found.state == "wrong" and found.mend and str(tmp_path / "b") in found.found
    installed(tmp_path / "a", "2.12.0")
    assert len(environment.distributions(path=[first])) == 2, "an update that was broken off"
    assert environment.twice(()) is None


@pytest.mark.parametrize(("imported", "state"), [("2.13.0+cpu", "ok"), ("2.12.0", "wrong"), ("", "ok")])
def test_what_is_imported_is_what_pip_knows(imported, state):
    found = environment.twice([("2.13.0", "/site")], imported)
    assert found is not None and found.state == state and bool(found.mend) == (state == "wrong")


def test_isolation_and_allocators():
    states = [environment.isolation(rung).state for rung in ("overlay", "landlock", "redirect", "")]
    assert states == ["ok", "note", "note", "wrong"]
    assert [environment.allocators(found).state for found in ({"tcmalloc": "/lib/x.so"}, {})] == ["ok", "note"]


# -- all at once -------------------------------------------------------------------------------------------------------


def test_whatever_fails_the_others_are_looked_at(monkeypatch):
    """Each source of facts fails in turn; those checks that need it are unknown, and no other."""

    def fails(*args: object, **named: object) -> object:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(build, "ask_torch", lambda: TorchFacts(version="2.13.0+cpu", mkl=True, capability="AVX2"))
    whole_names = {check.name for check in look("overlay", "", {}, quick=True).checks}
    monkeypatch.setattr(whole.gpus, "look", fails)
    monkeypatch.setattr(whole.psutil, "swap_memory", fails)
    monkeypatch.setattr(whole.clock, "look", fails)
    found = {check.name: check for check in look("overlay", "", {}, quick=True).checks}
    unknown = {name for name, check in found.items() if "broken on purpose" in check.found}
    assert {"GPU", "swap", "clock", "NUMA nodes", "torch and device"} <= unknown
    assert all(found[name].state == "unknown" and found[name].why for name in unknown)
    assert whole_names <= found.keys()
    assert not unknown & {"torch", "memory", "Python", "system", "open files", "compiler"}


def test_a_torch_that_cannot_be_asked(monkeypatch):
    def fails() -> TorchFacts:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(build, "ask_torch", fails)
    found = {check.name: check.state for check in look("overlay", "", {}, quick=True).checks}
    assert found["torch"] == "unknown" and found["memory"] in ("ok", "note") and found["system"] in ("ok", "note")


def test_a_working_folder_that_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "ask_torch", lambda: TorchFacts(failure="not asked"))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = {check.name: check.state for check in look("", "no rung", {}, quick=True).checks}
    assert found["this folder"] == "unknown" and found["isolation"] == "wrong"
