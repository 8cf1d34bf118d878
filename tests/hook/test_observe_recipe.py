"""What a diagnosis sees of how a training is set up, on trainings that run here, and once through the command line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import upshift
from torch import nn
from torch.nn import functional as F
from watched import Keeping, watched

from upshift.diagnose import diagnose
from upshift.hook.recipe import Recipe, thinned
from upshift.measure.steps import loss_values, total_loss
from upshift.records import Measurement
from upshift.records.codec import read
from upshift.records.recipe import RecipeFacts

X, Y = torch.randn(16, 4), torch.randn(16, 2)


class Looking(Keeping):
    """Keeps the records of the steps and looks at the recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe = Recipe()

    def torch_ready(self, torch) -> None:
        self.recipe.install(torch)

    def on_step(self, record) -> None:
        super().on_step(record)
        self.recipe.on_step(self.watch, record)
        if len(self.records) == 1:
            self.recipe.listen(torch)

    def facts(self) -> RecipeFacts:
        losses = [total_loss(loss_values(record)) for record in self.records]
        return self.recipe.facts(self.watch, self.records, losses, [])


@contextlib.contextmanager
def looking() -> Iterator[Looking]:
    controller = Looking()
    with watched(controller):
        try:
            yield controller
        finally:
            controller.recipe.close()


def step(model, optimizer, x=X, y=Y) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()


class Net(nn.Module):
    """`body` lies before `cut`, `spare` is not called, `gate` begins at zero."""

    def __init__(self, cut=False):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2)
        self.spare = nn.Linear(3, 3)
        self.cut = cut

    def forward(self, x):
        hidden = self.drop(self.body(x))
        return self.head(hidden.detach() if self.cut else hidden)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_parameters_that_never_get_a_gradient_are_named() -> None:
    with looking() as seen:
        model = Net(cut=True)
        model.spare.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, optimizer)
        found = seen.facts()
    assert found.no_gradient.names == ("body.weight", "body.bias") and found.no_gradient.tensors == 2
    assert found.no_gradient.share == pytest.approx(40 / 58)
    assert found.gradient_steps == 3 and not found.zero_gradient.tensors and not found.not_optimized.tensors


def test_a_gradient_of_zeros_is_told_from_none_and_from_a_late_one() -> None:
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.gate = nn.Linear(4, 2), nn.Parameter(torch.zeros(1))
            self.dead = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.gate * self.late(x) + 0 * self.dead

    with looking() as seen:
        model = Gated()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, optimizer)
        found = seen.facts()
    assert found.zero_gradient.names == ("dead",) and not found.no_gradient.tensors


def test_a_part_that_is_used_now_and_then_has_learnt() -> None:
    with looking() as seen:
        model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(40):
            step(model[number == 37], optimizer)
        found = seen.facts()
    assert not found.no_gradient.tensors and not found.zero_gradient.tensors


def test_two_optimizers_whose_gradients_are_cleared_after_each_step() -> None:
    with looking() as seen:
        models = [nn.Linear(4, 2), nn.Linear(4, 2)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        for _ in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                step(model, optimizer)
                optimizer.zero_grad()
        found = seen.facts()
    assert not found.no_gradient.tensors and not found.not_optimized.tensors


def test_lbfgs_makes_its_gradients_within_the_step() -> None:
    with looking() as seen:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(model(X), Y)
            loss.backward()
            return loss

        optimizer.step(closure)
        found = seen.facts()
    assert found.gradient_steps == 1 and not found.no_gradient.tensors


def test_gradients_for_parameters_no_optimizer_holds() -> None:
    with looking() as seen:
        model = Net()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        waiting = torch.optim.SGD(model.body.parameters(), lr=0.1)
        step(model, optimizer)
        assert not seen.facts().not_optimized.tensors
        del waiting
        step(model, optimizer)
        found = seen.facts()
    assert found.not_optimized.names == ("body.weight", "body.bias")


# -- modes, evaluation, weights ---------------------------------------------------------------------------------------


def test_a_model_left_in_evaluation_mode_after_evaluation() -> None:
    with looking() as seen:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            step(model, optimizer)
        model.eval()
        with torch.no_grad():
            model(X)
        for _ in range(3):
            step(model, optimizer)
        found = seen.facts()
    (mode,) = found.modes
    assert (mode.steps, mode.eval_steps, mode.last_eval_steps) == (7, 3, 3)
    assert mode.trained_in_eval and mode.put_in_eval and mode.optimized and mode.mode_layers == ("Dropout",)
    assert found.evaluations == 1 and not found.loaded


def test_evaluation_without_leaving_training_mode_and_a_teacher_in_every_step() -> None:
    with looking() as seen:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(8):
            step(model, optimizer)
            if number in (3, 5):
                with torch.no_grad():
                    model(X)
        once = seen.facts()
        for _ in range(40):
            with torch.no_grad():
                model(X)
            step(model, optimizer)
        always = seen.facts()
    assert once.evaluations == 2 and not once.modes[0].put_in_eval and not once.modes[0].trained_in_eval
    assert once.modes[0].mode_layers == ("BatchNorm1d",)
    assert always.evaluations == 0


def test_the_loss_of_each_evaluation_beside_the_training_before_it() -> None:
    def loss(output, target, **how):
        return F.cross_entropy(output, target, **how)

    classes = torch.randint(0, 2, (16,))
    with looking() as seen:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.no_grad():
            expected = float(nn.CrossEntropyLoss()(model(X), classes))
        for number in range(9):
            step(model, optimizer)
            with torch.no_grad():
                nn.L1Loss()(torch.ones(3), torch.zeros(3))  # a metric of the training itself
                if number in (2, 5):
                    for half in (slice(0, 8), slice(8, 16)):
                        loss(model(X[half]), classes[half], reduction="sum")
        with torch.no_grad():
            nn.CrossEntropyLoss()(model(X), classes)
        found = seen.facts().scores
    training = F.mse_loss(model(X), Y).item()
    assert [item.step for item in found] == [3, 6, 9]
    for item in found:
        assert item.evaluation == pytest.approx(expected) and item.training == pytest.approx(training)


def test_a_criterion_can_be_scripted_before_training() -> None:
    with looking():
        criterion = torch.jit.script(nn.MSELoss())
        assert criterion(X, X).item() == 0


def test_loaded_weights_are_noticed() -> None:
    with looking() as seen:
        model = nn.Linear(4, 2)
        model.load_state_dict(model.state_dict())
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert seen.facts().loaded


# -- learning rate, loss, decay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "changes", "names"),
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 2), 2, ("StepLR",)),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), 0, ("ReduceLROnPlateau",)),
        (lambda o: None, 0, ()),
    ],
)
def test_learning_rates(schedule: Callable, changes: int, names: tuple[str, ...]) -> None:
    with looking() as seen:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = schedule(optimizer)
        for _ in range(6):
            step(model, optimizer)
            if names == ("StepLR",):
                scheduler.step()
        found = seen.facts()
    assert found.schedulers == names and found.rate_changes == changes
    assert found.rate_first == 0.1 and found.rate_last == pytest.approx(0.1 ** (1 + changes))


def test_rates_set_by_hand_and_in_a_tensor() -> None:
    with looking() as seen:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False)
        for number in range(3):
            optimizer.param_groups[0]["lr"].fill_(0.5 + number)
            step(model, optimizer)
        found = seen.facts()
    assert (found.rate_first, found.rate_last, found.rate_changes) == (0.5, 2.5, 2)


def test_a_loss_that_is_not_finite_is_numbered_and_left_out_of_the_curve() -> None:
    with looking() as seen:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for number in range(4):
            step(model, optimizer, y=Y * (math.inf if number == 3 else 1))
        found = seen.facts()
    assert found.first_not_finite == 3 and len(found.curve) == 3


def test_a_long_curve_is_thinned_to_means_of_equal_length() -> None:
    curve, stride = thinned([float(i) for i in range(1001)])
    assert stride == 6 and len(curve) == 166 and curve[0] == 2.5 and curve[-1] == 992.5
    assert thinned([]) == ((), 1)


def test_decoupled_decay_of_vectors_is_counted() -> None:
    with looking() as seen:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        groups = [
            {"params": model[0].parameters(), "weight_decay": 0.1},
            {"params": model[1:].parameters(), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        step(model, optimizer)
        assert (seen.facts().decay, seen.facts().decayed_vectors) == (0.1, 1)
    with looking() as seen:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        step(model, optimizer)
        assert seen.facts().decayed_vectors == 0


def test_everything_is_taken_out_again() -> None:
    before = (nn.Module.train, nn.Module.load_state_dict, torch.optim.lr_scheduler.LRScheduler.__init__)
    with looking():
        assert nn.Module.train is not before[0]
    assert (nn.Module.train, nn.Module.load_state_dict, torch.optim.lr_scheduler.LRScheduler.__init__) == before


# -- through the command line -----------------------------------------------------------------------------------------

FROZEN = """
import torch
from torch import nn
from torch.nn import functional as F

epochs = 1_000_000
x, y = torch.randn(32, 4), torch.randn(32, 2)
body, head = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1)), nn.Linear(8, 2)
model = nn.Sequential(body, head)
optimizer = torch.optim.SGD([*body.parameters(), head.bias], lr=0.0)
model.train(False)
while True:
    optimizer.zero_grad()
    F.mse_loss(head(body(x).detach()), y).backward()
    optimizer.step()
"""


def test_diagnose_names_what_makes_a_training_useless(write: Callable[[str, str], Path]) -> None:
    script = write("train.py", FROZEN)
    options = ("--no-probe", "-q", "--seconds", "2s", "--json", "found.json")
    ended = upshift("diagnose", *options, script.name, cwd=script.parent)
    assert ended.code == 0, ended.err
    rules = {item.rule for item in diagnose(read(script.parent / "found.json", Measurement))}
    assert {"never_learns", "not_in_optimizer", "loss_not_falling", "trains_in_eval_mode", "no_seed"} <= rules
    assert "Parameters never learn" in ended.err
