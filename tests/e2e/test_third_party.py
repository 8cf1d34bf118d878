"""Techniques of other packages: the example passes the contract suite, is found and applied; broken ones fail."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from conftest import TRAIN, execute, upshift

from upshift.hardware.device import device_name
from upshift.records import planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept, Plan
from upshift.records.runfold import fold
from upshift.records.trial import Proof
from upshift.techniques import registry

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "technique-package"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def install(site: Path, name: str, points: dict[str, str]) -> None:
    """What pip would write, as far as entry points need it."""
    info = site / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[upshift.techniques]\n{lines}")


PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which the example package is installed as its pyproject.toml says."""
    install(tmp_path / "site", NAME, PROJECT["entry-points"]["upshift.techniques"])
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{EXAMPLE / 'src'}"}


def test_the_example_passes_the_contract_suite(environment):
    done = execute([sys.executable, *PYTEST, "-rA"], EXAMPLE, **environment)
    assert done.code == 0, done.out
    passed = [line.split("::", 1)[1] for line in done.out.splitlines() if line.startswith("PASSED")]
    assert "TestAnomalyOff::test_training[anomaly_off-oracle-anomaly]" in passed
    assert "TestAnomalyOff::test_registered[anomaly_off-plain]" in passed


def test_explain_shows_it(environment, tmp_path):
    done = upshift("explain", "anomaly_off", cwd=tmp_path, **environment)
    assert done.code == 0, done.err
    assert "numerics     bitwise" in done.out and "docs.pytorch.org" in done.out


def test_run_applies_it(environment, tmp_path, write, monkeypatch):
    flag = "print('anomaly detection', torch.is_anomaly_enabled())\n"
    write("train.py", TRAIN.format(steps=5).replace("torch.manual_seed(0)", "torch.autograd.set_detect_anomaly(True)\n"
                                                    "torch.manual_seed(0)") + flag)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    device = device_name("cpu")
    plan = Plan(
        script="train.py", arguments=(), created="", device=device, verdict="",
        fingerprint=fingerprint("train.py", (), device, {"anomaly_off": {}}, packages=(f"{NAME} 1",)), speedup=1.5,
        kept=(Kept(name="anomaly_off", numerics="bitwise"),),
        proof=Proof(rung="bitwise", passed=True, reason="", steps=5),
    )  # fmt: skip
    planfile.write(tmp_path / "train.upshift.toml", plan)
    done = upshift("run", "train.py", cwd=tmp_path, **environment)
    assert done.code == 0, done.err
    assert done.out.endswith("anomaly detection False\n")
    (folder,) = (tmp_path / ".upshift" / "runs").iterdir()
    assert any("anomaly detection is off" in event.text for event in fold(folder).events)


def test_a_plan_names_the_packages_its_techniques_come_from(environment, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert registry.packages(["fused", "anomaly_off"]) == (f"{NAME} 1",)
    assert registry.packages(["fused"]) == ()


# -- broken ones -------------------------------------------------------------------------------------------------------

BROKEN = """
import torch
from upshift.sites import Card, Numerics, ProcessStart, Verdict
from upshift.sites.protocol import BaseApplied


class Leaves:
    card = Card(name="leaves", summary="x", source="y", sites=("process_start",), numerics=Numerics.BITWISE,
                switchable="process", targets=("forward",))

    def numerics(self, settings, facts):
        return self.card.numerics

    def check(self, seen):
        return Verdict(True, "always")

    def at(self, moment, settings):
        torch.set_float32_matmul_precision("medium")
        return BaseApplied()


class Guesses(Leaves):
    card = Card(name="guesses", summary="x", source="y", sites=("model_created",), numerics=Numerics.BITWISE,
                switchable="process", targets=("forward",))

    def check(self, seen):
        return Verdict(True, "always", gain=2.0, candidates=({"width": 3},))

    def at(self, moment, settings):
        return None
"""


# The class on its card is registered under another name.
RENAMED = """
from faulty import Leaves
from upshift.sites import Card
from upshift.testing.suite import TechniqueContract


class Renamed(Leaves):
    card = Card(**{name: getattr(Leaves.card, name) for name in Card.__struct_fields__ if name != "name"}, name="other")


class TestRenamed(TechniqueContract):
    technique = Renamed
"""


@pytest.fixture
def broken(tmp_path: Path, write) -> Path:
    """A folder with packages at fault: a flag left behind, a gain from nowhere, a module that cannot be imported."""
    points = {"leaves": "faulty:Leaves", "guesses": "faulty:Guesses", "gone": "nowhere:Gone"}
    install(tmp_path / "site", "faulty", points)
    write("site/faulty.py", BROKEN)
    write("test_renamed.py", RENAMED)
    return tmp_path


def suite(folder: Path, *arguments: str):
    """The contract suite on named techniques, in a process of its own: they leave things behind."""
    command = [sys.executable, *PYTEST, "-p", "upshift.testing.plugin", *arguments]
    return execute(command, folder, PYTHONPATH=str(folder / "site"))


def test_broken_promises_are_told_in_words(broken):
    named = [f"--upshift-technique={name}" for name in ("leaves", "guesses", "denormals")]
    done = suite(broken, *named, "test_renamed.py", "-k", "registered or (promise and not Renamed)", "-rA")
    assert done.code == pytest.ExitCode.TESTS_FAILED
    outcomes = {line.split(" - ")[0].rpartition("::")[2]: line.split()[0] for line in done.out.splitlines()
                if line.startswith(("PASSED", "FAILED"))}  # fmt: skip
    assert {name for name, outcome in outcomes.items() if outcome == "FAILED"} == {
        "test_promise[guesses-pure]",
        "test_promise[guesses-nothing_seen]",
        "test_promise[leaves-says_nothing_done]",
        "test_registered[other]",
    }
    assert outcomes["test_promise[denormals-pure]"] == outcomes["test_registered[leaves]"] == "PASSED"
    assert "leaves breaks a promise: global state was not restored: ['matmul']" in done.out
    assert "guesses breaks a promise: a predicted gain says what it rests on" in done.out
    assert "applies to a script without anything to act on: always" in done.out
    assert "nothing is registered as 'other': declare the entry point other = " in done.out
    assert "promises.py" not in done.out and "another exception" not in done.out


@pytest.mark.parametrize(
    ("name", "said"), [("nope", "there is no technique called 'nope'"), ("gone", "'gone' of faulty cannot be loaded")]
)
def test_a_name_that_is_not_there_and_a_package_that_does_not_load(broken, name, said):
    done = suite(broken, "--upshift-technique", name)
    assert done.code == pytest.ExitCode.USAGE_ERROR
    assert said in done.err and "Traceback" not in done.err


def test_explain_names_the_package_that_does_not_load(broken):
    done = upshift("explain", "leaves", cwd=broken, PYTHONPATH=str(broken / "site"))
    assert done.code == 3 and "Traceback" not in done.err
    assert any("the technique 'gone' of faulty cannot be loaded" in line for line in done.said)
    assert "pip uninstall faulty" in done.err
