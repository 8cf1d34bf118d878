"""Which plan a run uses, and what it is held against; the whole way is in the tests of `upshift run`."""

from __future__ import annotations

import msgspec
import pytest

from upshift import __version__
from upshift.hardware.device import device_name, kinds_here
from upshift.hook.choosing import Wanted, choose_plan, mark
from upshift.records import planfile
from upshift.records.plan import Kept, Pace, Plan
from upshift.records.trial import Proof
from upshift.sites.runner import ChildSpec

PACE = Pace(0.01, 0.009, 0.011, 8)


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("pass\n")
    return tmp_path / "train.py"


def written(script, **more):
    device = device_name(kinds_here()[0])
    techniques = {"fused": {"kind": "fused"}}
    plan = Plan(
        script="train.py", arguments=(), created="now", device=device, verdict="faster",
        fingerprint=mark("train.py", (), techniques, device, (), module=False),
        kept=(Kept(name="fused", settings={"kind": "fused"}),), proof=Proof("trajectory", True, "r"), **more,
    )  # fmt: skip
    planfile.write(script.with_suffix(".upshift.toml"), plan)
    return choose_plan(ChildSpec(mode="run", target="train.py"), Wanted())


def test_the_pace_of_the_plan_goes_with_it(script):
    found = written(script, pace=PACE, upshift=__version__)
    assert found.techniques and found.pace is not None and msgspec.convert(found.pace, Pace) == PACE
    assert not any("made with" in note for note in found.notes)


@pytest.mark.parametrize("version", ["0.0.1", "9.9"])
def test_a_plan_of_another_upshift_is_used_and_that_is_said(script, version):
    found = written(script, upshift=version)
    assert found.techniques and found.pace is None
    assert any(f"made with upshift {version}, this is {__version__}" in note for note in found.notes)


def test_a_plan_that_does_not_say_its_version_is_used_without_a_word(script):
    assert not any("made with" in note for note in written(script).notes)


def test_a_stale_plan_that_is_used_all_the_same_has_no_pace(script):
    written(script, pace=PACE)
    script.write_text("print(1)\n")
    spec = ChildSpec(mode="run", target="train.py")
    assert choose_plan(spec, Wanted()).techniques == {}
    found = choose_plan(spec, Wanted(allow_stale=True))
    assert found.techniques and found.pace is None
