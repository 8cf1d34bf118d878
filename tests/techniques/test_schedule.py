"""A schedule laid over a constant rate, against torch's own schedulers in the same training."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from upshift.records.measurement import OptimizerFacts
from upshift.records.recipe import RecipeFacts
from upshift.sites import NoEffect, OptimizerSeen, Stage
from upshift.techniques.schedule import Schedule, multiplier
from upshift.testing.contract import defaults, measurement

STEPS = 30


def train(settings=None, schedule=None, *, kind=torch.optim.SGD, steps=STEPS, change=None):
    """Final parameters, rates the script sees after each step, and the stage; with the technique or a scheduler."""
    torch.manual_seed(3)
    model = torch.nn.Linear(6, 3).double()
    x, y = torch.randn(64, 6).double(), torch.randint(0, 3, (64,))
    optimizer = kind([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}], lr=0.1)
    scheduler = schedule(optimizer) if schedule else None
    stage = Stage([(Schedule(), {**defaults(Schedule()), **settings})] if settings else [], lambda *_: None)
    rates = []
    for step in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if not step:
            stage.raise_site(OptimizerSeen(optimizer=optimizer))
        for _, applied in stage.steps_for(optimizer):
            applied.before_step(optimizer)
        optimizer.step()
        if scheduler:
            scheduler.step()
        if change:
            change(step, optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return model.weight.detach().clone(), rates, stage


def linear(optimizer):
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def warm(decay):
    def schedule(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, 1 / 7, 1.0, total_iters=6)
        return lr_scheduler.SequentialLR(optimizer, [rise, decay(optimizer)], milestones=[6])

    return schedule


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"kind": "linear"}, linear),
        ({"kind": "cosine"}, cosine),
        ({"kind": "linear", "warmup": 0.2}, warm(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=24))),
        ({"kind": "cosine", "warmup": 0.2}, warm(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=24))),
    ],
    ids=["linear", "cosine", "linear after warm-up", "cosine after warm-up"],
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_are_those_of_torchs_scheduler(settings, schedule, kind):
    expected, _, _ = train(schedule=schedule, kind=kind)
    plain, _, _ = train(kind=kind)
    found, rates, stage = train({**settings, "steps": STEPS}, kind=kind)
    # torch's schedulers go from step to step, so they round otherwise.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, plain, rtol=1e-3)
    assert rates == [[0.1, 0.2]] * STEPS  # what the script reads and logs is its own
    assert stage.effects() == {"schedule": ""} and not stage.problems()


def test_linear_decay_is_the_same_bits_as_by_lambda():
    def by_hand(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / STEPS)

    expected, _, _ = train(schedule=by_hand)
    assert torch.equal(train({"steps": STEPS})[0], expected)


def test_multiplier_rises_to_one_and_falls_to_zero():
    for kind in ("linear", "cosine"):
        values = [multiplier(kind, step, 100, 0.1) for step in range(101)]
        assert values[10] == 1.0 and values[100] == 0.0 and multiplier(kind, 500, 100, 0.1) == 0.0
        assert all(a < b for a, b in pairwise(values[:11])) and values[0] > 0
        assert all(a > b for a, b in pairwise(values[10:]))


def test_after_the_last_step_nothing_is_learned_and_that_is_told():
    at_the_end, _, _ = train({"steps": STEPS})
    beyond, _, stage = train({"steps": STEPS}, steps=STEPS + 5)
    assert torch.equal(beyond, at_the_end)
    assert "learning rate is zero" in stage.problems()["schedule"]


def test_a_script_that_begins_to_change_the_rate_keeps_its_own_from_there():
    def halve(step, optimizer):
        if step == 4:
            for group in optimizer.param_groups:
                group["lr"] /= 2

    _, rates, stage = train({"steps": STEPS}, change=halve)
    assert rates[-1] == [0.05, 0.1]
    assert "changes the learning rate itself, at step 5" in stage.problems()["schedule"]
    assert "changes the learning rate itself" in stage.effects()["schedule"]


def decayed(optimizer):
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    return optimizer


def optimizer_of(kind=torch.optim.SGD, **arguments):
    return kind([torch.nn.Parameter(torch.zeros(1))], **arguments)


@pytest.mark.parametrize(
    ("optimizer", "steps", "reason"),
    [
        (optimizer_of(lr=0.1), 0, "number of steps is not known"),
        (decayed(optimizer_of(lr=0.1)), 10, "scheduler of its own"),
        (optimizer_of(torch.optim.LBFGS), 10, "finds the size of its steps itself"),
    ],
)
def test_what_is_left_alone_says_why(optimizer, steps, reason):
    outcome = Schedule().at(OptimizerSeen(optimizer=optimizer), {**defaults(Schedule()), "steps": steps})
    assert isinstance(outcome, NoEffect) and reason in outcome.reason


def test_taken_off_the_rate_is_the_scripts_own():
    optimizer = optimizer_of(lr=0.5)
    applied = Schedule().at(OptimizerSeen(optimizer=optimizer), {**defaults(Schedule()), "steps": 10})
    for _ in range(3):
        applied.before_step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    applied.close()
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer._optimizer_step_post_hooks
    assert applied.state_dict() == {"done": 3}


CONSTANT = RecipeFacts(rate_first=0.1, rate_last=0.1, rate_changes=0, declared=("validation",))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"recipe": None}, "is not known"),
        ({"recipe": RecipeFacts(rate_changes=None)}, "is not known"),
        ({"recipe": RecipeFacts(rate_changes=0, schedulers=("StepLR",))}, "StepLR"),
        ({"recipe": RecipeFacts(rate_changes=3)}, "changes the learning rate itself"),
        ({"recipe": RecipeFacts(rate_changes=0, declared=("schedule",))}, "source speaks of a schedule"),
        ({"recipe": CONSTANT, "steps_total": None}, "number of steps"),
        ({"recipe": CONSTANT, "optimizers": ()}, "0 optimizers"),
        (
            {
                "recipe": CONSTANT,
                "optimizers": (OptimizerFacts("AdamWScheduleFree", 1, 1, "cpu", ("float32",)),),
            },
            "itself",
        ),
    ],
)
def test_refused_with_the_reason(facts, reason):
    verdict = Schedule().check(measurement(**facts))
    assert not verdict.applies and reason in verdict.reason


def test_candidates_know_the_number_of_steps():
    verdict = Schedule().check(measurement(recipe=CONSTANT, steps_total=700))
    assert verdict.applies and [item["steps"] for item in verdict.candidates] == [700, 700]
    assert [item["kind"] for item in verdict.candidates] == ["linear", "cosine"]
