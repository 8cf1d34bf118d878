"""Schedules against torch's own schedulers and the formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from upshift.engine import schedules
from upshift.engine.lengths import Span
from upshift.errors import UsageError

STEPS = 40
SPAN = Span(STEPS, 10, 100)  # four epochs of ten steps


def sgd(lr=0.4, **more):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr, **more)


def of_torch(build, steps=STEPS, base=0.4):
    """The rates that a scheduler of torch gives, through the base rate."""
    optimizer = sgd(base)
    scheduler = build(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / base)
        optimizer.step()
        scheduler.step()
    return rates


def warm(after, steps, first=1):
    """A linear warm-up before a scheduler of torch."""

    def build(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, first / (steps + 1), 1.0, total_iters=steps)
        return lr_scheduler.SequentialLR(optimizer, [rise, after(optimizer)], milestones=[steps])

    return build


PAIRS = {
    "constant": (schedules.constant(), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "cosine": (schedules.cosine(), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "cosine to a floor": (
        schedules.cosine(final=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.04),
    ),
    "cosine after a warm-up": (
        schedules.cosine("10 %"), warm(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 4), 4),
    ),
    "linear": (schedules.linear(), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=STEPS)),
    "linear after a warm-up": (
        schedules.linear("1 epoch", final=0.2),
        warm(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=STEPS - 10), 10),
    ),
    "step": (schedules.step("1 epoch"), lambda o: lr_scheduler.StepLR(o, 10, 0.1)),
    "step at places": (
        schedules.step(at=("2 epochs", 35, "50 samples"), gamma=0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [5, 20, 35], 0.3),
    ),
    "one cycle": (schedules.one_cycle(), lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=STEPS)),
    "one cycle between two steps": (
        schedules.one_cycle(0.33, start=10, final=100, shape="linear"),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.4, total_steps=STEPS, pct_start=0.33, div_factor=10, final_div_factor=100, anneal_strategy="linear"
        ),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_rates_as_torch(name):
    schedule, build = PAIRS[name]
    factor = schedule.factor(SPAN)
    # torch multiplies from step to step, which rounds; the closed form does not.
    assert [factor(step) for step in range(STEPS)] == pytest.approx(of_torch(build), rel=1e-12, abs=1e-14)


def test_inverse_square_root_is_that_of_the_paper():
    factor = schedules.inverse_square_root(8).factor(SPAN)
    # Vaswani et al. 2017: min(step^-0.5, step * warmup^-1.5), through its value at the end of the warm-up
    for step in range(8, STEPS):
        assert factor(step) == pytest.approx(step**-0.5 / 8**-0.5, rel=1e-14)
    assert [factor(step) for step in range(8)] == [(step + 1) / 9 for step in range(8)]
    assert schedules.inverse_square_root(timescale="1 epoch").factor(SPAN)(10) == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("linear", lambda x: 1 - x),
        ("1-sqrt", lambda x: 1 - x**0.5),
        ("cosine", lambda x: 0.5 + math.cos(x * math.pi) / 2),
    ],
)
def test_warm_up_stable_decay(shape, formula):
    factor = schedules.warm_up_stable_decay(4, "25 %", final=0.1, shape=shape).factor(SPAN)
    expected = [(step + 1) / 5 for step in range(4)] + [1.0] * 26
    expected += [0.1 + 0.9 * formula(step / 10) for step in range(10)]
    assert [factor(step) for step in range(STEPS)] == pytest.approx(expected, rel=1e-14)


ALL = {
    **{name: pair[0] for name, pair in PAIRS.items()},
    "inverse": schedules.inverse_square_root("5 %"),
    "wsd": schedules.warm_up_stable_decay("5 %"),
}


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(sorted(ALL)), steps=st.integers(40, 3000), step=st.integers(0, 5000))
def test_a_factor_is_a_share_and_the_last_one_holds(name, steps, step):
    factor = ALL[name].factor(Span(steps, 10, 100))
    assert 0 <= factor(step) <= 1 + 1e-12
    if name != "inverse" and "step" not in name:
        assert factor(steps + step) == factor(steps)


@pytest.mark.parametrize("final", [0.0, 0.25])
@pytest.mark.parametrize("kind", [schedules.cosine, schedules.linear])
def test_the_end_is_the_final_share(kind, final):
    assert kind(final=final).factor(SPAN)(STEPS) == pytest.approx(final, abs=1e-15)


def train(steps, schedule, model, optimizer, bound=None, begin=0):
    bound = bound or schedules.bind(schedule, optimizer, SPAN)
    for step in range(begin, steps):
        bound(step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    return bound


def made(tensor_rate=False):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    rate = torch.tensor(0.1) if tensor_rate else 0.1
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": rate / 2}]
    return model, torch.optim.AdamW(groups, lr=rate)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.cosine("10 %"),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
        schedules.from_torch(lambda o: lr_scheduler.MultiStepLR(o, [1, 1, 3], 0.5), every="1 epoch"),
        lambda o: warm(lambda inner: lr_scheduler.ExponentialLR(inner, 0.9), 6)(o),
    ],
    ids=["closed form", "torch", "torch by epoch", "torch in sequence"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_resuming_anywhere_gives_the_same_weights(schedule):
    whole, optimizer = made()
    train(STEPS, schedule, whole, optimizer)
    for cut in (1, 10, 11, 33):
        model, optimizer = made()
        bound = train(cut, schedule, model, optimizer)
        states = model.state_dict(), optimizer.state_dict(), bound.state_dict()
        again, other = made()
        bound = schedules.bind(schedule, other, SPAN)
        again.load_state_dict(states[0])
        other.load_state_dict(states[1])
        bound.load_state_dict(states[2])
        train(STEPS, schedule, again, other, bound, begin=cut)
        assert torch.equal(again.weight, whole.weight), cut
        assert torch.equal(again.bias, whole.bias), cut


def test_a_builder_of_torch_is_stepped_as_a_script_would():
    model, optimizer = made()
    train(STEPS, lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS), model, optimizer)
    other, plain = made()
    scheduler = lr_scheduler.OneCycleLR(plain, 0.1, total_steps=STEPS)
    for step in range(STEPS):
        torch.manual_seed(step)
        plain.zero_grad()
        other(torch.randn(4, 3)).square().mean().backward()
        plain.step()
        if step + 1 < STEPS:
            scheduler.step()
    assert torch.equal(model.weight, other.weight)


def test_a_scheduler_of_torch_may_count_epochs():
    optimizer = sgd(1.0)
    bound = schedules.bind(
        schedules.from_torch(lambda o: lr_scheduler.ExponentialLR(o, 0.5), "1 epoch"), optimizer, SPAN
    )
    rates = []
    for step in range(STEPS):
        bound(step)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    assert rates == [0.5 ** (step // 10) for step in range(STEPS)]


def test_the_state_of_a_scheduler_is_plain():
    _, optimizer = made()
    bound = schedules.bind(lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5]), optimizer, SPAN)
    milestones = bound.state_dict()["scheduler"]["milestones"]
    assert type(milestones) is dict and milestones == {2: 2, 5: 1}
    bound.load_state_dict(bound.state_dict())
    assert sorted(bound.scheduler.milestones.elements()) == [2, 2, 5]


def test_a_scheduler_that_watches_a_metric_is_told_it():
    _, optimizer = made()
    bound = schedules.bind(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5), optimizer, SPAN)
    for value in (1.0, 2.0):
        bound(7)
        bound.evaluated(value)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.025]


def test_a_tensor_rate_is_filled_and_groups_keep_their_proportion():
    _, optimizer = made(tensor_rate=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedules.linear().bind(optimizer, SPAN)(10)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [float(rate) for rate in rates] == pytest.approx([0.075, 0.0375])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.cosine("4 epochs").factor(SPAN), "warm_up"),
        (lambda: schedules.cosine().factor(Span(None)), "whole training"),
        (lambda: schedules.step(), "every so often"),
        (lambda: schedules.step("0 %").factor(SPAN), "at least one step"),
        (lambda: schedules.inverse_square_root().factor(SPAN), "timescale"),
        (lambda: schedules.warm_up_stable_decay("60 %", "50 %").factor(SPAN), "do not fit"),
        (lambda: schedules.warm_up_stable_decay(shape="steep").factor(SPAN), "1-sqrt"),
        (lambda: schedules.one_cycle("100 %").factor(SPAN), "does not fit"),
        (lambda: schedules.bind("cosine", sgd(), SPAN), "schedule is a str"),
        (lambda: schedules.bind(lambda o: None, sgd(), SPAN), "not a scheduler"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_a_schedule_is_described_the_same_in_every_process():
    assert repr(schedules.cosine("5 epochs")) == "cosine(warm_up='5 epochs', final=0.0)"
    assert schedules.cosine("5 epochs") == schedules.cosine("5 epochs") != schedules.cosine("6 epochs")
    assert " at 0x" not in repr(schedules.from_function(lambda step: 0.9**step))
    assert " at 0x" not in repr(schedules.from_torch(lambda optimizer: None))
