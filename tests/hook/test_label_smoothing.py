"""Label smoothing in scripts under the watch, against `cross_entropy(label_smoothing=)` by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from watched import Keeping, watched

from upshift.techniques.fused import Fused
from upshift.techniques.label_smoothing import LabelSmoothing
from upshift.testing.contract import defaults, measurement

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))
WEIGHT = torch.tensor([1.0, 2.0, 0.5])
PLAIN = F.cross_entropy


def acting(smoothing=0.1):
    return [(LabelSmoothing(), {"smoothing": smoothing})]


def model_of(seed=3):
    torch.manual_seed(seed)
    return nn.Linear(6, 3)


def by_module(**arguments):
    return nn.CrossEntropyLoss(**arguments)


def by_function(**arguments):
    from torch.nn.functional import cross_entropy  # as a script's import, after the hook

    return lambda logits, target: cross_entropy(logits, target, **arguments)


def by_position(**arguments):
    return lambda logits, target: F.cross_entropy(logits, target, arguments.get("weight"))


@pytest.mark.parametrize("style", [by_module, by_function, by_position])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"weight": WEIGHT}, {"ignore_index": 1}, {"reduction": "sum"}],
    ids=lambda value: "-".join(value) or "plain",
)
def test_training_is_that_with_the_argument_by_hand(style, arguments):
    if style is by_position and set(arguments) - {"weight"}:
        arguments = {}
    losses = []
    with watched(Keeping(), acting(0.05)) as control:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        criterion = style(**arguments)
        for _ in range(5):
            optimizer.zero_grad()
            loss = criterion(model(X), Y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert control.stage.effects() == {"label_smoothing": ""}
    twin = model_of()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for expected in losses:
        optimizer.zero_grad()
        loss = PLAIN(twin(X), Y, label_smoothing=0.05, **arguments)
        loss.backward()
        optimizer.step()
        assert loss.item() == expected
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_keeps_the_plain_loss(off):
    with watched(Keeping(), acting()):
        model = model_of()
        assert F.cross_entropy(model(X), Y).item() == PLAIN(model(X), Y, label_smoothing=0.1).item()
        with off():
            assert F.cross_entropy(model(X), Y).item() == PLAIN(model(X), Y).item()


def test_evaluation_mode_with_gradients_on_keeps_the_plain_loss_until_training_goes_on():
    with watched(Keeping(), acting()):
        model = model_of()
        F.cross_entropy(model(X), Y).backward()
        model.eval()
        assert F.cross_entropy(model(X), Y).item() == PLAIN(model(X), Y).item()
        model.train()
        assert F.cross_entropy(model(X), Y).item() == PLAIN(model(X), Y, label_smoothing=0.1).item()


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        (Y, {"label_smoothing": 0.2}, "smooths its labels itself"),
        (F.one_hot(Y, 3).float(), {}, "probabilities"),
    ],
)
def test_what_the_script_does_itself_stays(target, arguments, reason):
    with watched(Keeping(), acting()) as control:
        loss = F.cross_entropy(model_of()(X), target, **arguments)
        assert loss.item() == PLAIN(model_of()(X), target, **arguments).item()
        assert reason in control.stage.effects()["label_smoothing"]


def test_without_a_cross_entropy_it_says_that_it_did_nothing():
    with watched(Keeping(), acting()) as control:
        F.mse_loss(model_of()(X), torch.zeros(32, 3)).backward()
        assert control.stage.effects()["label_smoothing"]
        assert control.stage.acted == ()


def test_a_wrong_call_fails_as_without_us():
    with watched(Keeping(), acting()):
        with pytest.raises(TypeError, match="cross_entropy"):
            F.cross_entropy(model_of()(X))
        with pytest.raises(TypeError, match="nonsense"):
            F.cross_entropy(model_of()(X), Y, nonsense=1)


def test_only_a_technique_that_asks_for_the_site_pays_for_it():
    with watched(Keeping(), [(Fused(), defaults(Fused()))]) as control:
        assert F.cross_entropy is PLAIN and not any("cross_entropy" in name for name in control.watch.patches.names())
    with watched(Keeping(), acting()) as control:
        assert F.cross_entropy is not PLAIN and any("cross_entropy" in name for name in control.watch.patches.names())
    assert F.cross_entropy is PLAIN


def test_taken_off_the_loss_is_plain_at_once():
    with watched(Keeping(), acting()) as control:
        logits = model_of()(X)
        assert F.cross_entropy(logits, Y).item() != PLAIN(logits, Y).item()
        control.stage.switch([])
        assert F.cross_entropy(logits, Y).item() == PLAIN(logits, Y).item()
        control.stage.switch(["label_smoothing"])
        assert F.cross_entropy(logits, Y).item() != PLAIN(logits, Y).item()
        control.stage.remove("label_smoothing", "asked")
        assert F.cross_entropy(logits, Y).item() == PLAIN(logits, Y).item()


def test_a_technique_that_raises_is_rescued_and_the_call_is_the_scripts():
    class Rescuing(Keeping):
        def rescue(self, module, names, error):
            self.said.append((names, str(error), ""))
            self.stage.remove(names[0], str(error))

    class Raises(LabelSmoothing):
        def at(self, moment, settings):
            applied = super().at(moment, settings)

            def before_loss(arguments):
                arguments.clear()
                raise ValueError("broken")

            applied.before_loss = before_loss
            return applied

    with watched(Rescuing(), [(Raises(), {"smoothing": 0.1})]) as control:
        logits = model_of()(X)
        assert F.cross_entropy(logits, Y).item() == PLAIN(logits, Y).item()
        assert control.said[-2:] == [
            (("label_smoothing",), "broken", ""), ("off", "label_smoothing", "broken"),
        ]  # fmt: skip


def test_a_scripted_loss_still_compiles():
    with watched(Keeping(), acting()), warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits, target)

        scripted = torch.jit.script(loss)
        logits = model_of()(X)
        assert scripted(logits, Y).item() == PLAIN(logits, Y).item()


def test_the_verdict_needs_a_loss():
    technique = LabelSmoothing()
    assert technique.check(measurement()).applies
    assert "no model with a loss" in technique.check(measurement(loss_seen=False)).reason
    assert "no model with a loss" in technique.check(measurement(models=())).reason
