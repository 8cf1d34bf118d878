"""The average against `torch.optim.swa_utils.AveragedModel` and plain arithmetic; training must stay as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from upshift.records.recipe import RecipeFacts
from upshift.sites import ModelSeen, NoEffect, OptimizerSeen, Stage
from upshift.techniques.ema import Ema, ramped
from upshift.testing.contract import defaults, measurement

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))


def model_of():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Script:
    """A training whose model and optimizers are shown to a stage as the hook shows them; none without `settings`."""

    def __init__(self, settings=None, model=None, optimizers=None):
        entries = [] if settings is None else [(Ema(), {**defaults(Ema()), **settings})]
        self.stage = Stage(entries, lambda *_: None)
        self.model = model or model_of()
        self.optimizers = optimizers(self.model) if optimizers else [torch.optim.SGD(self.model.parameters(), lr=0.1)]
        self.seen = weakref.WeakSet()

    def call(self, x, model=None):
        module = model or self.model
        if module not in self.seen:
            self.seen.add(module)
            self.stage.raise_site(ModelSeen(module=module, args=(x,), training=module.training))
        call = module
        for _, applied in self.stage.forward_for(module):
            call = around(applied, call, module)
        return call(x)

    def step(self, optimizer):
        if optimizer not in self.seen:
            self.seen.add(optimizer)
            self.stage.raise_site(OptimizerSeen(optimizer=optimizer))
        for _, applied in self.stage.steps_for(optimizer):
            applied.before_step(optimizer)
        optimizer.step()

    def train(self, steps, each=None):
        self.model.train()
        for step in range(steps):
            i = torch.arange(16) + 16 * (step % 4)
            self.model.zero_grad()
            loss = nn.functional.cross_entropy(self.call(X[i]), Y[i])
            loss.backward()
            for optimizer in self.optimizers:
                self.step(optimizer)
            if each:
                each()

    def evaluate(self, off=torch.no_grad):
        self.model.eval()
        with off():
            return self.call(X).clone()

    def weights(self):
        return [item.detach().clone() for item in (*self.model.parameters(), *self.model.buffers())]


def around(applied, call, module):
    return lambda *args: applied.around(call, module, args, {})


@pytest.fixture
def started():
    made = []

    def start(*args, **settings):
        made.append(Script(*args, **settings))
        return made[-1]

    yield start
    for script in made:
        script.stage.close()


def averaged(model, decay):
    """torch's own, with the formula written out."""

    def move(average, current, n):
        kept = min(decay, (1 + int(n)) / (10 + int(n)))
        return kept * average + (1 - kept) * current

    return AveragedModel(model, avg_fn=move, use_buffers=True)


@pytest.mark.parametrize("decay", [0.999, 0.5])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_is_that_of_torchs_averaged_model(started, decay, off):
    script, plain = started({"decay": decay}), started()
    oracle = averaged(plain.model, decay)
    script.train(25)
    plain.train(25, lambda: oracle.update_parameters(plain.model))
    expected = oracle.eval()(X)
    torch.testing.assert_close(script.evaluate(off), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, plain.evaluate(), rtol=1e-2, atol=1e-2)
    assert script.stage.effects() == {"ema": ""}


def test_training_goes_on_as_if_nobody_had_evaluated(started):
    script, plain = started({}), started()
    for _ in range(3):
        script.train(7)
        plain.train(7)
        script.evaluate(), plain.evaluate()
    script.train(1)
    plain.train(1)
    assert all(map(torch.equal, script.weights(), plain.weights()))


def test_an_optimizer_step_brings_the_weights_back_even_without_a_call(started):
    script, plain = started({}), started()
    for item in (script, plain):
        item.train(5)
        item.evaluate()
        item.step(item.optimizers[0])  # the gradient of the last batch once more
    assert all(map(torch.equal, script.weights(), plain.weights()))


def test_what_is_saved_after_an_evaluation_is_what_was_evaluated(started):
    script = started({})
    script.train(10)
    seen = script.evaluate()
    twin = model_of()
    twin.load_state_dict(copy.deepcopy(script.model.state_dict()))
    assert torch.equal(twin.eval()(X), seen)
    _, average = script.stage._applied["ema"]
    kept = average.state_dict()
    assert kept["averaged"] == 10
    assert all(map(torch.equal, kept["average"], [*twin.parameters(), twin[1].running_mean, twin[1].running_var]))
    script.train(0)
    script.call(X)  # training mode: the average is in the state still
    assert all(map(torch.equal, average.state_dict()["average"], kept["average"]))


def test_loaded_weights_are_evaluated_as_loaded_and_begin_a_new_average(started):
    script = started({})
    script.train(5)
    best = copy.deepcopy(script.model.state_dict())
    expected = copy.deepcopy(script.model).eval()(X)
    script.train(5)
    script.model.load_state_dict(best)  # the average is out
    assert torch.equal(script.evaluate(), expected)
    script.train(5)
    script.evaluate()
    script.model.load_state_dict(best)  # the average is in
    assert torch.equal(script.evaluate(), expected)
    plain = started(model=copy.deepcopy(script.model))
    plain.optimizers[0].load_state_dict(script.optimizers[0].state_dict())
    script.train(3)
    plain.train(3)
    assert all(map(torch.equal, script.weights(), plain.weights()))


def test_one_layer_written_after_an_evaluation_stays_and_the_others_come_back(started):
    script, plain = started({}), started()
    for item in (script, plain):
        item.train(5)
        item.evaluate()
        with torch.no_grad():
            item.model[3].weight.fill_(0.25)
        item.train(3)
    assert all(map(torch.equal, script.weights(), plain.weights()))


def test_another_optimizer_of_the_same_weights_begins_a_new_average(started):
    script, plain = started({}), started()
    for item in (script, plain):
        item.train(5)
        item.evaluate()
        item.optimizers[:] = [torch.optim.Adam(item.model.parameters(), lr=0.01)]
    oracle = averaged(plain.model, 0.999)
    script.train(6)
    plain.train(6, lambda: oracle.update_parameters(plain.model))
    torch.testing.assert_close(script.evaluate(), oracle.eval()(X), rtol=1e-5, atol=1e-6)
    script.train(2)
    plain.train(2)
    assert all(map(torch.equal, script.weights(), plain.weights()))


def test_nothing_of_a_model_is_kept_when_it_is_gone(started):
    script = started({})
    script.train(2)
    gone = weakref.ref(script.model[0].weight)
    script.model = model_of()
    script.optimizers[:] = [torch.optim.SGD(script.model.parameters(), lr=0.1)]
    gc.collect()
    script.train(2)
    assert gone() is None


def test_two_optimizers_of_one_model_average_their_own_parts(started):
    def two(model):
        return [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[1:].parameters(), lr=0.01)]

    script, plain = started({}, optimizers=two), started(optimizers=two)
    oracle = averaged(plain.model, 0.999)
    script.train(10)
    plain.train(10, lambda: oracle.update_parameters(plain.model))
    torch.testing.assert_close(script.evaluate(), oracle.eval()(X), rtol=1e-5, atol=1e-6)
    script.train(5)
    plain.train(5)
    assert all(map(torch.equal, script.weights(), plain.weights()))


def test_a_graph_that_waits_keeps_its_weights(started):
    script, plain = started({}), started()
    for item in (script, plain):
        item.train(5)
        loss = nn.functional.cross_entropy(item.call(X), Y)
        item.evaluate()
        item.model.train()
        item.model.zero_grad()
        loss.backward()
        item.step(item.optimizers[0])
    assert all(map(torch.equal, script.weights(), plain.weights()))
    assert "backward pass was awaited" in script.stage.problems()["ema"]


def test_micro_batches_left_over_do_not_keep_the_average_out(started):
    script = started({})
    script.train(5)
    nn.functional.cross_entropy(script.call(X), Y).backward()  # no step follows
    raw = copy.deepcopy(script.model).eval()(X)
    assert not torch.allclose(script.evaluate(), raw, rtol=1e-3)


def test_a_model_trained_in_evaluation_mode_is_trained_as_without_us(started):
    script, plain = started({}), started()
    for item in (script, plain):
        item.model.eval()
        for _ in range(5):
            item.model.zero_grad()
            nn.functional.cross_entropy(item.call(X), Y).backward()
            item.step(item.optimizers[0])
    assert all(map(torch.equal, script.weights(), plain.weights()))
    assert not torch.allclose(script.evaluate(), plain.evaluate(), rtol=1e-3)


def test_parameters_that_join_later_are_averaged_too(started):
    def head(model):
        return [torch.optim.SGD(model[3].parameters(), lr=0.1)]

    script, plain = started({}, optimizers=head), started(optimizers=head)
    for item in (script, plain):
        item.train(3)
        item.optimizers[0].add_param_group({"params": list(item.model[0].parameters())})
    oracle = averaged(plain.model, 0.999)  # begins anew with them
    script.train(6)
    plain.train(6, lambda: oracle.update_parameters(plain.model))
    torch.testing.assert_close(script.evaluate(), oracle.eval()(X), rtol=1e-5, atol=1e-6)


def test_switched_off_and_closed_the_weights_are_the_scripts(started):
    script, plain = started({}), started()
    script.train(5)
    plain.train(5)
    script.evaluate()
    script.stage.switch([])
    assert all(map(torch.equal, script.weights(), plain.weights()))
    script.stage.switch(["ema"])
    script.train(3)
    plain.train(3)
    script.evaluate()
    script.stage.close()
    assert all(map(torch.equal, script.weights(), plain.weights()))
    assert not script.optimizers[0]._optimizer_step_post_hooks


def test_without_an_evaluation_it_says_that_nothing_used_it(started):
    script = started({})
    script.train(5)
    assert "no" in script.stage.effects()["ema"] and "evaluat" in script.stage.effects()["ema"]


def test_a_script_that_writes_its_weights_after_every_step_is_told_so(started):
    script = started({})

    def clip():
        with torch.no_grad():
            for item in script.model.parameters():
                item.clamp_(-0.5, 0.5)

    script.train(5, clip)
    raw = copy.deepcopy(script.model).eval()(X)
    assert torch.equal(script.evaluate(), raw)
    assert script.stage.effects()["ema"]


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (ModelSeen(module=nn.Linear(2, 1).requires_grad_(False)), "no parameter is trained"),
        (ModelSeen(module=AveragedModel(nn.Linear(2, 1))), "averages the weights itself"),
        (ModelSeen(module=nn.Linear(2, 1).bfloat16()), "would stand still"),
        (OptimizerSeen(optimizer=torch.optim.SGD(nn.Linear(2, 1).half().parameters())), "would stand still"),
    ],
)
def test_what_is_left_alone_says_why(moment, reason):
    outcome = Ema().at(moment, defaults(Ema()))
    assert isinstance(outcome, NoEffect) and reason in outcome.reason


def test_the_ramp_ends_at_the_decay():
    assert ramped(0.999, 0) == 0.1 and ramped(0.999, 10**6) == 0.999 and ramped(0.5, 8) == 0.5


@pytest.mark.parametrize(
    ("facts", "applies", "reason"),
    [
        ({}, True, "evaluation was seen"),
        ({"recipe": None}, True, "may come later"),
        ({"recipe": RecipeFacts(declared=("validation",))}, True, "may come later"),
        ({"recipe": RecipeFacts(declared=("seed",))}, False, "show an evaluation"),
        ({"models": ()}, False, "no model with an optimizer"),
        ({"optimizers": ()}, False, "no model with an optimizer"),
    ],
)
def test_the_verdict(facts, applies, reason):
    verdict = Ema().check(measurement(**facts))
    assert verdict.applies is applies and reason in verdict.reason
