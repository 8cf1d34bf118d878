"""Plans that claim more than was measured: of another script, for other arguments, edited, or without their proof."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import TRAIN, UPSHIFT, execute, often

from upshift.hardware.device import device_name, kinds_here
from upshift.records import Plan, Proof, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept

CLAIM = "3.00x"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script, and beside it a plan that was measured on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN.format(steps=2))
    planned(Proof(rung="trajectory", passed=True, reason="lag", steps=200, lag=0.0, lag_high=0.001))
    return tmp_path


def planned(proof: Proof | None) -> None:
    """Write the plan of `train.py`, with this proof."""
    device, techniques = device_name(kinds_here()[0]), {"threads": {"intra": 1}}
    plan = Plan(
        script="train.py", arguments=("--width", "8"), created="2026-01-01 00:00:00", device=device, verdict="faster",
        fingerprint=fingerprint("train.py", ("--width", "8"), device, techniques, files=("train.py",)),
        speedup=3.0, low=2.9, high=3.1, pairs=50, proof=proof, kept=(Kept(name="threads", settings={"intra": 1}),),
    )  # fmt: skip
    planfile.write(Path("train.upshift.toml"), plan)


def said(place: Path, *arguments: str) -> str:
    ended = execute([UPSHIFT, "run", "train.py", *arguments], place)
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) == 2, "it trains all the same"
    return "".join(ended.said)


EDITS = {
    "other arguments": (None, None, "the arguments were"),
    "another script": (None, None, "the script has changed"),
    "another device": ('device = "', 'device = "another ', "the device was"),
    "other versions": ("torch 2", "torch 1", "the versions were"),
    "an edited setting": ("intra = 1", "intra = 2", "was edited"),
}


@pytest.mark.parametrize("edit", often(EDITS, "an edited setting"))
def test_a_plan_of_something_else_is_not_used(place: Path, edit: str) -> None:
    old, new, reason = EDITS[edit]
    file = place / "train.upshift.toml"
    if old is not None:
        text = file.read_text()
        assert old in text
        head, mark, rest = text.partition("fingerprint" if edit != "an edited setting" else "kept")
        file.write_text(head + mark + re.sub(re.escape(old), new, rest))
    if edit == "another script":
        (place / "train.py").write_text(TRAIN.format(steps=2) + "\n# another line\n")
    found = said(place, "--width", "9" if edit == "other arguments" else "8")
    assert reason in found and "baseline" in found and CLAIM not in found, found


@pytest.mark.parametrize(
    "proof",
    [
        None,
        Proof(rung="none", passed=False, reason="the planned loss is higher"),
        Proof(rung="update", passed=True, reason="updates agree"),
    ],
    ids=["no proof", "failed", "too weak"],
)
def test_a_plan_without_the_proof_that_is_required_is_not_used(place: Path, proof: Proof | None) -> None:
    planned(proof)
    found = said(place, "--width", "8")
    assert "is required; training the baseline" in found and CLAIM not in found, found


def test_the_plan_that_was_measured_is_used(place: Path) -> None:
    assert CLAIM in said(place, "--width", "8")
