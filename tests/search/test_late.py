"""The late step through real processes: what begins late is seen, although the losses do not tell yet."""

from __future__ import annotations

import pytest
from conftest import TRAIN

from upshift.hook.process import HookRunner
from upshift.records.trial import Proof
from upshift.search.confirm import after_late_step
from upshift.search.duel import Duel
from upshift.search.late import Late, late_step
from upshift.search.selftest.planted import Planting, planted, tiny
from upshift.sites.runner import ChildSpec


@pytest.mark.parametrize(
    ("fault", "size", "said"),
    [
        ("dropped_gradient", 1.0, "at step 17, from one and the same state, the gradients differ more"),
        pytest.param("dropout_off", 1.0, "dropout draws no mask, ", marks=pytest.mark.extra),
        pytest.param("loss_scale", 1e-7, "", marks=pytest.mark.extra),
    ],
)
def test_what_is_seen(tmp_path, fault, size, said):
    script = tiny("--model", "mlp", "--batch-size", "8", "--dropout", "0.3")
    duel = Duel(Planting(HookRunner(scratch=tmp_path)), script, timeout=120.0, patience=240.0)
    try:
        a = duel.start({})
        b = duel.start(planted(fault=fault, size=size, from_step=14))
        duel.level(16)
        found, unseen = late_step(duel, a, b, "float32")
        assert said in found and bool(found) == bool(said) and not unseen
        assert a.losses[16] == pytest.approx(b.losses[16], rel=1e-6), "the same batch, the same state, no dropout"
    finally:
        duel.close()


@pytest.mark.extra
def test_a_script_that_ends_first_is_no_evidence_and_is_said(tmp_path, write):
    write("train.py", TRAIN.format(steps=5))
    duel = Duel(HookRunner(scratch=tmp_path), ChildSpec(mode="arm", target=str(tmp_path / "train.py")), timeout=120.0)
    try:
        a, b = duel.start({}), duel.start({})
        duel.level(5)
        assert late_step(duel, a, b, "float32") == Late(unseen="the script ends before it")
    finally:
        duel.close()


def test_what_was_not_seen_is_no_rejection_but_labelled():
    proof = Proof(rung="trajectory", passed=True, reason="alike", weaker="flat")
    assert after_late_step(proof, Late()) == proof
    labelled = after_late_step(proof, Late(unseen="the state takes 3.0 GiB"))
    assert labelled.passed and labelled.weaker == "flat; no late step was compared: the state takes 3.0 GiB"
    wrong = after_late_step(proof, Late("the loss is 3"))
    assert (wrong.passed, wrong.rung, wrong.reason) == (False, "none", "the loss is 3")
