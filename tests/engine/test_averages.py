"""Averages of weights against `torch.optim.swa_utils` and the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from upshift.engine.averages import Average, Ema, Swa, refresh_statistics
from upshift.engine.lengths import Span
from upshift.errors import UsageError


class Net(torch.nn.Module):
    """Tied weights, a frozen one, and batch normalisation."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.frozen = torch.nn.Parameter(torch.randn(4), requires_grad=False)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)) + self.frozen)


def train(average, model, steps, watch=None):
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=0.5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randint(0, 7, (16,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), x).backward()
        optimizer.step()
        average.update()
        if watch:
            watch(model)


def made():
    torch.manual_seed(1)
    return Net()


def bits(model):
    return {name: item.clone() for name, item in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_ema_is_torchs_bit_for_bit():
    model = made()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average = Average(model, Ema(0.9, warm_up=False))
    train(average, model, 20, theirs.update_parameters)
    assert torch.equal(average.weights()["embed.weight"], theirs.module.embed.weight)


def test_swa_is_torchs_bit_for_bit_and_begins_where_it_should():
    model = made()
    theirs = AveragedModel(model)
    average = Average(model, Swa("50 %", every=3), Span(20))
    seen = []

    def watch(model):
        seen.append(model)
        if len(seen) in (10, 13, 16, 19):
            theirs.update_parameters(model)

    train(average, model, 20, watch)
    assert average.averaged == 4
    assert torch.equal(average.weights()["embed.weight"], theirs.module.embed.weight)


def test_the_warm_up_of_the_decay_is_the_formula():
    model = made().double()
    average = Average(model, Ema(0.99))
    mean, n = None, 0

    def watch(model):
        nonlocal mean, n
        decay = min(0.99, (1 + n) / (10 + n))
        now = model.embed.weight.detach()
        mean = now.clone() if mean is None else decay * mean + (1 - decay) * now
        n += 1

    train(average, model, 200, watch)
    assert torch.allclose(average.weights()["embed.weight"], mean, rtol=0, atol=1e-14)
    assert Ema(0.5, warm_up=True).share(1000) == 0.5


def test_swapped_in_for_evaluation_and_back_bit_for_bit():
    model = made()
    average = Average(model, Ema(0.9))
    assert not average.swap_in(), "there is no average yet"
    train(average, model, 5)
    before, mean = bits(model), average.weights()
    with average.swapped() as present:
        assert present and average.swapped_in
        assert torch.equal(model.embed.weight, mean["embed.weight"])
        assert model.head.weight is model.embed.weight
        with pytest.raises(RuntimeError, match="swapped in"):
            average.update()
        model.train()(torch.arange(7))  # writes statistics
        model.embed.weight.data.mul_(3)
    assert same(bits(model), before)
    assert same(average.weights(), mean), "what is written while it is in does not reach the average"


def test_an_exception_in_evaluation_gives_the_weights_back():
    model = made()
    average = Average(model, Ema(0.9))
    train(average, model, 3)
    before = bits(model)
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    assert same(bits(model), before)


def test_training_is_the_same_with_and_without():
    ends = []
    for evaluate in (False, True):
        model = made()
        average = Average(model, Ema(0.9))

        def watch(model, average=average, evaluate=evaluate):
            if evaluate:
                with average.swapped(), torch.inference_mode():
                    model.eval()(torch.arange(7))
                model.train()

        train(average, model, 10, watch)
        ends.append(bits(model))
    assert same(*ends)


def test_weights_load_into_a_plain_model_with_tied_weights_tied():
    model = made()
    average = Average(model, Ema(0.9))
    train(average, model, 5)
    weights = average.weights()
    assert weights["embed.weight"] is weights["head.weight"]
    other = Net()
    other.load_state_dict(weights)
    with average.swapped():
        model.eval(), other.eval()
        assert torch.equal(other(torch.arange(7)), model(torch.arange(7)))
    assert torch.equal(other.frozen, model.frozen)
    assert not any(item.data_ptr() == weights["norm.weight"].data_ptr() for item in model.parameters())


@pytest.mark.parametrize("rule", [Ema(0.9), Swa(4, every=2), Ema(0.9, start=3, every=2, buffers="averaged")])
def test_resuming_gives_the_same_average(rule):
    whole = made()
    average = Average(whole, rule)
    train(average, whole, 12)

    model = made()
    held = [Average(model, rule)]

    class Cut:
        """The average, which is saved and made anew after the seventh step."""

        def update(self):
            held[0].update()
            state = held[0].state_dict()
            if state["step"] == 7:
                copied = {name: item.clone() for name, item in state["means"].items()}
                held[0] = Average(model, rule)
                held[0].load_state_dict({**state, "means": copied})

    train(Cut(), model, 12)
    assert held[0].averaged == average.averaged > 2
    assert same(held[0].weights(), average.weights())


def test_an_average_of_another_model_is_refused():
    state = Average(made(), Ema()).state_dict()
    with pytest.raises(UsageError, match=r"another model: bias, embed\.weight"):
        Average(torch.nn.Linear(2, 2), Ema()).load_state_dict(state)


def test_16_bit_weights_are_averaged_in_float32():
    model = torch.nn.Linear(64, 1, bias=False).bfloat16()
    average = Average(model, Ema(0.999, warm_up=False))
    with torch.no_grad():
        model.weight.fill_(0)
        average.update()
        model.weight.fill_(1)
        for _ in range(1000):
            average.update()
    # 1 - 0.999^1000; in bfloat16 the average would stop far below
    assert float(average.state_dict()["means"]["weight"].mean()) == pytest.approx(1 - 0.999**1000, rel=1e-4)
    before = bits(model)
    with average.swapped():
        assert model.weight.dtype == torch.bfloat16
        assert model.weight[0, 0].item() == pytest.approx(0.632, rel=1e-2)
    assert same(bits(model), before)


def test_buffers_are_averaged_when_asked():
    model = made().double()
    average = Average(model, Ema(0.5, warm_up=False, buffers="averaged"))
    mean = None

    def watch(model):
        nonlocal mean
        now = model.norm.running_mean.clone()
        mean = now if mean is None else 0.5 * mean + 0.5 * now

    train(average, model, 6, watch)
    with average.swapped():
        assert torch.allclose(model.norm.running_mean, mean, atol=1e-15)
        assert int(model.norm.num_batches_tracked) == 6, "counts are not averaged"


def test_refreshed_statistics_are_torchs():
    torch.manual_seed(2)
    batches = [torch.randint(0, 7, (12,)) for _ in range(5)]
    ours, theirs = made(), made()
    ours.eval()
    assert refresh_statistics(ours, batches) == 1
    assert not ours.training and ours.norm.momentum == 0.1
    update_bn(batches, theirs)
    assert torch.equal(ours.norm.running_mean, theirs.norm.running_mean)
    assert torch.equal(ours.norm.running_var, theirs.norm.running_var)
    assert refresh_statistics(torch.nn.Linear(2, 2), iter(())) == 0


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UsageError, match="decay"):
        Ema(decay)


def test_a_model_that_is_not_trained_has_no_average():
    with pytest.raises(UsageError, match="nothing to average"):
        Average(torch.nn.Linear(2, 2).requires_grad_(False), Ema())
