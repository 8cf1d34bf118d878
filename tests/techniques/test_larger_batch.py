"""Larger batches against the same change made by hand: the same batches, rates and parameters, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from upshift.records.measurement import LoaderFacts, OptimizerFacts
from upshift.sites import LoaderArgs, LoaderReady, NoEffect, OptimizerSeen, Stage
from upshift.techniques.larger_batch import LargerBatch, rate_factor, rule
from upshift.testing.contract import measurement

SAMPLES = 512
DATA = TensorDataset(
    torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 3, (SAMPLES,), generator=torch.Generator().manual_seed(2)),
)


class Script:
    """A stage with the technique, and a script's loaders and optimizers as the hook would show them."""

    def __init__(self, **settings):
        self.said = []
        self.stage = Stage(
            [(LargerBatch(), {"factor": 2, "scaling": "linear", **settings})], lambda *item: self.said.append(item)
        )

    def loader(self, **arguments):
        """`DataLoader(DATA, ...)`."""
        arguments = {"dataset": DATA, **arguments}
        self.stage.raise_site(LoaderArgs(args=arguments))
        return DataLoader(**arguments)

    def iterate(self, loader, first):
        if first:
            self.stage.raise_site(LoaderReady(loader=loader))
        return iter(loader)

    def before_step(self, optimizer, first):
        if first:
            self.stage.raise_site(OptimizerSeen(optimizer=optimizer))
        for _, applied in self.stage.steps_for(optimizer):
            applied.before_step(optimizer)


@pytest.fixture
def started():
    """Makes scripts, and ends them: techniques act on a whole process."""
    made = []

    def start(**settings):
        made.append(Script(**settings))
        return made[-1]

    yield start
    for script in made:
        script.stage.close()


def batches_of(loader):
    return [len(x) for x, _ in loader]


def train(script, kind, schedule, batch, rate, steps=30):
    """Losses, rates the script sees and final parameters; `script` None: without the technique."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = kind(model.parameters(), rate)
    scheduler = schedule(optimizer) if schedule else None
    arguments = {"batch_size": batch, "shuffle": True}
    loader = script.loader(**arguments) if script else DataLoader(DATA, **arguments)
    losses, rates, step = [], [], 0
    while step < steps:
        for x, y in script.iterate(loader, step == 0) if script else loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if script:
                script.before_step(optimizer, step == 0)
            optimizer.step()
            losses.append(loss.item())
            if scheduler:
                scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
            step += 1
            if step == steps:
                break
    return losses, rates, [item.detach().clone() for item in model.parameters()]


def sgd(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=0.01)


def adamw(parameters, rate):
    return torch.optim.AdamW(parameters, lr=rate)


def tensor_rate(parameters, rate):
    first, second = [], []
    for index, item in enumerate(parameters):
        (first if index % 2 else second).append(item)
    # Both groups share the tensor.
    return torch.optim.Adam([{"params": first}, {"params": second}], lr=torch.tensor(rate), foreach=False)


def by_lambda(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def by_steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.5)


@pytest.mark.parametrize(
    ("kind", "scaling", "factor", "times", "schedule"),
    [
        (sgd, "linear", 2, 2.0, None),
        (sgd, "linear", 8, 8.0, by_lambda),
        (sgd, "linear", 4, 4.0, by_steps),
        (adamw, "sqrt", 4, 2.0, by_steps),
        (adamw, "sqrt", 2, 2.0**0.5, None),
        (adamw, "none", 2, 1.0, by_lambda),
        (tensor_rate, "linear", 2, 2.0, None),
    ],
)
def test_parameters_are_those_of_the_change_by_hand(kind, scaling, factor, times, schedule, started):
    by_hand, _, expected = train(None, kind, schedule, 8 * factor, 0.05 * times)
    _, own_rates, _ = train(None, kind, schedule, 8, 0.05)
    script = started(factor=factor, scaling=scaling)
    losses, rates, found = train(script, kind, schedule, 8, 0.05)
    assert losses == by_hand
    assert all(map(torch.equal, found, expected))
    assert rates == own_rates  # what the script reads and logs is its own
    assert script.stage.effects() == {"larger_batch": ""}


def test_a_rate_set_by_hand_at_every_step_is_scaled_too(started):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    script = started(factor=4)
    list(script.iterate(script.loader(batch_size=8, shuffle=True), True))
    for step, rate in enumerate((1.0, 0.5, 0.25)):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.ones(1)
        script.before_step(optimizer, step == 0)
        optimizer.step()
    assert parameter.item() == -4 * 1.75 and optimizer.param_groups[0]["lr"] == 0.25


def test_a_step_that_raises_leaves_the_rate_of_the_script(started):
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise ValueError("once")
            return super().step(closure)

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Failing([parameter], lr=1.0)
    script = started(factor=2)
    list(script.iterate(script.loader(batch_size=8, shuffle=True), True))
    parameter.grad = torch.ones(1)
    script.before_step(optimizer, True)
    with pytest.raises(ValueError, match="once"):
        optimizer.step()
    Failing.fails = False
    optimizer.param_groups[0]["lr"] = 0.5
    script.before_step(optimizer, False)
    optimizer.step()
    assert parameter.item() == -1.0 and optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_inside_another_is_scaled_once(started):
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups[0]["params"], {})
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure=None):
            script.before_step(self.inner, True)
            return self.inner.step(closure)

    parameter = torch.nn.Parameter(torch.zeros(1))
    outer = Outer(torch.optim.SGD([parameter], lr=1.0))
    script = started(factor=2)
    list(script.iterate(script.loader(batch_size=8, shuffle=True), True))
    parameter.grad = torch.ones(1)
    script.before_step(outer, True)
    outer.step()
    assert parameter.item() == -2.0 and outer.param_groups[0]["lr"] == 1.0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dataset": Stream(), "batch_size": 8}, "stream"),
        ({"batch_sampler": BatchSampler(RandomSampler(DATA), 8, False)}, "batch sampler of its own"),
        ({"batch_size": None, "shuffle": True}, "no batch size"),
        ({"batch_size": 8}, "fixed order"),
        ({"batch_size": 8, "sampler": SequentialSampler(DATA)}, "fixed order"),
        ({"batch_size": 64, "shuffle": True}, "4 batches an epoch would be left"),
        ({"batch_size": 257, "shuffle": True, "drop_last": True}, "0 batches an epoch would be left"),
    ],
)
def test_what_cannot_be_enlarged_stays_and_the_rate_with_it(arguments, reason, started):
    script = started()
    before = {"dataset": DATA, **arguments}
    seen = dict(before)
    outcome = LargerBatch().at(LoaderArgs(args=seen), {"factor": 2, "scaling": "linear"})
    assert isinstance(outcome, NoEffect) and reason in outcome.reason and seen == before
    script.loader(**arguments)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    script.before_step(optimizer, True)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].item() == -1.0
    assert reason in script.stage.effects()["larger_batch"]


def test_a_shuffled_loader_that_evaluates_gets_its_size_back_before_its_first_batch(started):
    script = started()
    training = script.loader(batch_size=8, shuffle=True)
    held_out = script.loader(batch_size=8, sampler=SubsetRandomSampler(range(160)))
    assert len(training) == 32
    assert {len(x) for x, _ in script.iterate(training, True)} == {16}
    with torch.no_grad():
        assert {len(x) for x, _ in script.iterate(held_out, True)} == {8}
    assert len(held_out) == 20 and held_out.batch_size == 8
    assert script.stage.effects() == {"larger_batch": ""}


def test_without_the_larger_batches_the_rate_is_the_scripts_again(started):
    script = started(factor=4)
    loader = script.loader(batch_size=8, shuffle=True)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    script.before_step(optimizer, True)
    optimizer.step()
    with torch.no_grad():
        script.iterate(loader, True)
    script.before_step(optimizer, False)
    optimizer.step()
    assert parameter.item() == -5.0


def test_a_script_that_only_evaluates_in_random_order_is_told_so(started):
    script = started()
    with torch.no_grad():
        assert {len(x) for x, _ in script.iterate(script.loader(batch_size=8, shuffle=True), True)} == {8}
    assert "without gradients" in script.stage.effects()["larger_batch"]


def test_the_size_is_a_plain_number_to_the_script(started):
    script = started()
    loader = script.loader(batch_size=8, shuffle=True)
    assert loader.batch_size == 16 and f"{loader.batch_size}" == "16"
    assert type(pickle.loads(pickle.dumps(loader.batch_size))) is int
    assert type(copy.deepcopy(loader).batch_size) is int
    list(script.iterate(loader, True))
    assert type(loader.batch_size) is int and type(loader.batch_sampler.batch_size) is int


def test_taken_off_batches_and_rate_are_the_scripts_own(started):
    script = started(factor=4)
    loader = script.loader(batch_size=8, shuffle=True)
    list(script.iterate(loader, True))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    script.before_step(optimizer, True)
    optimizer.step()
    script.stage.remove("larger_batch", "asked")
    assert batches_of(loader) == [8] * 64
    script.before_step(optimizer, False)
    optimizer.step()
    assert parameter.item() == -5.0 and not optimizer._optimizer_step_post_hooks


def test_the_rule_goes_with_the_optimizer():
    assert [rule(name) for name in ("SGD", "AdamW", "RMSprop", "LBFGS", "Muon")] == [
        "linear", "sqrt", "sqrt", "none", "none",
    ]  # fmt: skip
    assert rate_factor(4, "linear") == 4.0 and rate_factor(4, "sqrt") == 2.0 and rate_factor(4, "none") == 1.0


def loader_facts(**changes):
    values = {"name": "DataLoader", "dataset": "Data", "training": True, "workers": 0, "batch_size": 8, "samples": 256,
              "iterable": False}  # fmt: skip
    return (LoaderFacts(**{**values, **changes}),)


def optimizer_facts(*names):
    return tuple(
        OptimizerFacts(name=name, parameters=10, tensors=2, device="cpu", dtypes=("float32",)) for name in names
    )


@pytest.mark.parametrize(
    ("facts", "candidates", "reason"),
    [
        ({"optimizers": optimizer_facts("SGD")}, [(2, "linear"), (4, "linear")], "in proportion"),
        ({"optimizers": optimizer_facts("AdamW")}, [(2, "sqrt"), (4, "sqrt")], "by its square root"),
        ({"optimizers": optimizer_facts("Muon")}, [(2, "none"), (4, "none")], "no rule is known"),
        ({"optimizers": optimizer_facts("SGD", "Adam")}, [], "no one rule"),
        ({"optimizers": ()}, [], "no optimizer seen"),
        ({"loaders": loader_facts(batch_size=32)}, [], "fewer than 8"),
        ({"loaders": loader_facts(batch_size=None)}, [], "not known"),
        ({"loaders": loader_facts(samples=None)}, [], "not known"),
        ({"loaders": loader_facts(iterable=True)}, [], "no training DataLoader"),
        ({"loaders": loader_facts(training=False)}, [], "no training DataLoader"),
    ],
)
def test_the_verdict_and_its_candidates(facts, candidates, reason):
    verdict = LargerBatch().check(measurement(**facts))
    assert [(item["factor"], item["scaling"]) for item in verdict.candidates] == candidates
    assert verdict.applies == bool(candidates) and reason in verdict.reason
