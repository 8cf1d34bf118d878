"""The contract every technique owes, and what is special about this one."""

from __future__ import annotations

import pytest
import torch
from upshift_anomaly_off.technique import AnomalyOff

from upshift.sites import OptimizerSeen, Stage
from upshift.testing.suite import TechniqueContract


@pytest.fixture(autouse=True)
def no_anomaly():
    yield
    torch.autograd.set_detect_anomaly(False)


class TestAnomalyOff(TechniqueContract):
    """upshift's suite trains without anomaly detection, where this technique has nothing to do: also with it, then."""

    technique = AnomalyOff

    @pytest.fixture(autouse=True, params=[False, True], ids=["plain", "anomaly"])
    def anomaly(self, request):
        torch.autograd.set_detect_anomaly(request.param)


class Training:
    """A tiny training with the technique on a stage."""

    def __init__(self):
        self.said = []
        self.stage = Stage([(AnomalyOff(), {})], lambda kind, name, text: self.said.append((kind, text)))
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.stage.raise_site(OptimizerSeen(self.optimizer))

    def step(self):
        for _, applied in self.stage.steps_for(self.optimizer):
            applied.before_step(self.optimizer)


def test_it_is_off_while_applied_and_back_at_the_end_with_the_choice_about_nan():
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    training = Training()
    assert not torch.is_anomaly_enabled() and training.said == [("applied", "anomaly detection is off")]
    training.stage.close()
    assert torch.is_anomaly_enabled() and not torch.is_anomaly_check_nan_enabled()


def test_without_it_the_script_is_told_that_nothing_was_done():
    training = Training()
    assert training.stage.effects() == {"anomaly_off": "anomaly detection is not on"}
    training.stage.close()
    assert not torch.is_anomaly_enabled()


def test_a_script_that_switches_it_on_at_every_step_is_left_alone():
    for number in range(3):
        with torch.autograd.detect_anomaly():
            if number == 0:
                training = Training()
            training.step()
    assert "again and again" in training.stage.effects()["anomaly_off"]
    training.stage.close()
    assert not torch.is_anomaly_enabled()


def test_a_gradient_that_is_nan_raises_once_the_technique_is_off():
    torch.autograd.set_detect_anomaly(True)
    training = Training()
    nan = (training.weight * 0).sqrt().sum() * 0  # 0 / 0 in the backward pass
    nan.backward()
    assert training.weight.grad.isnan().all()
    training.stage.switch([])
    with pytest.raises(RuntimeError, match="nan"):
        ((training.weight * 0).sqrt().sum() * 0).backward()
    training.stage.close()
