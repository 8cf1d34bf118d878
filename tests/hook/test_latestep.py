"""A state handed from one training to another, and what the next step of both shows."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from watched import Keeping, watched

from upshift.hook.dropout import dropout_off
from upshift.hook.latestep import MOST, LateStep, load, save
from upshift.measure.updates import LIMITS, apart


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.body(x))).mean((2, 3)))


def train(model, optimizer, steps, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 2, 6, 6)), torch.randint(0, 2, (8,))).backward()
        optimizer.step()


@pytest.fixture
def pair():
    """Two trainings that have parted, the second in another memory layout."""
    torch.manual_seed(1)
    first = Net()
    second = copy.deepcopy(first).to(memory_format=torch.channels_last)
    made = []
    for model, seed in ((first, 0), (second, 5)):
        with watched(Keeping()) as controller:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            train(model, optimizer, 3, seed)
            made.append((model, optimizer, controller.watch))
    return made


def state_of(model, optimizer):
    inside = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    return [value.detach().clone() for value in (*model.parameters(), *model.buffers(), *inside)]


def test_a_state_is_taken_over_in_place_whatever_the_layout(pair, tmp_path):
    (a, one, there), (b, two, here) = pair
    kept = [id(item) for item in b.parameters()]
    assert not all(map(torch.equal, state_of(a, one), state_of(b, two)))
    assert save(torch, there, str(tmp_path / "s.pt")) == ""
    drawn = torch.rand(3)
    torch.manual_seed(99)
    assert load(torch, here, str(tmp_path / "s.pt")) == ""
    assert torch.equal(torch.rand(3), drawn), "the random streams are those of the other training"
    assert all(map(torch.equal, state_of(a, one), state_of(b, two)))
    assert [id(item) for item in b.parameters()] == kept
    assert b.body.weight.is_contiguous(memory_format=torch.channels_last)


def test_states_that_are_not_alike_are_refused_and_nothing_is_changed(pair, tmp_path):
    (_, _, there), (b, two, here) = pair
    save(torch, there, str(tmp_path / "s.pt"))
    found = torch.load(tmp_path / "s.pt", weights_only=True)
    found["tensors"].pop("model0.norm.running_mean")
    torch.save(found, tmp_path / "s.pt")
    before = state_of(b, two)
    assert load(torch, here, str(tmp_path / "s.pt")) == "model0.norm.running_mean is not alike in both runs"
    assert all(map(torch.equal, before, state_of(b, two)))


def test_a_state_too_large_is_not_written(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("upshift.hook.latestep.MOST", 100)
    assert MOST > 100 and "GiB" in save(torch, pair[0][2], str(tmp_path / "s.pt"))
    assert not (tmp_path / "s.pt").exists()


def test_the_step_is_kept_with_dropout_off_and_hooks_are_gone_after_it(pair, tmp_path):
    model, optimizer, watch = pair[0]
    calls = []
    late = LateStep(
        watch, str(tmp_path / "late.npz"), lambda masks: calls.append("off") or (lambda: calls.append("on"))
    )
    before = [item.detach().clone() for item in model.parameters()]
    train(model, optimizer, 1)
    late.finish()
    assert calls == ["off", "on"]
    kept = dict(numpy.load(tmp_path / "late.npz"))
    for i, item in enumerate(model.parameters()):
        assert numpy.array_equal(kept[f"grad:optimizer0.group0.{i}"], item.grad.flatten().numpy())
        moved = (item.detach().flatten() - before[i].flatten()).numpy()
        assert numpy.array_equal(kept[f"update:optimizer0.group0.{i}"], moved)
    (tmp_path / "late.npz").unlink()
    train(model, optimizer, 1)
    assert not (tmp_path / "late.npz").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g, ""),
        (lambda g: {**g, "a": g["a"] * (1 + 1e-5)}, ""),
        (lambda g: {k: v * 1.1 for k, v in g.items()}, "norm ratio 1.1000"),
        (lambda g: {**g, "b": g["b"] * 0}, "b gets none"),
        (lambda g: {**g, "b": -g["b"]}, "worst in b (-1.0000)"),
        (lambda g: {"a": g["a"]}, "b is not alike"),
        (lambda g: {**g, "a": g["a"] * numpy.nan}, "a is not finite"),
    ],
)
def test_what_is_apart(change, said):
    draw = numpy.random.default_rng(0)
    gradients = {name: draw.normal(size=500).astype("float32") for name in "ab"}
    found = apart(gradients, change(gradients), LIMITS["float32"]["second"])
    assert said in found and bool(found) == bool(said)


def test_masks_are_noted_while_dropout_is_off():
    layer, masks = nn.Dropout(0.3), []
    on_again = dropout_off(torch, masks)
    x = torch.randn(2, 4, 4)
    assert torch.equal(layer(x), x) and torch.equal(F.dropout(x, 0.2), x)
    F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
    layer.eval()(x), nn.Dropout(0.0)(x), F.alpha_dropout(x, 0.4)
    assert masks == [0.3, 0.2, 0.1]
    on_again()
    assert (F.dropout(x, 0.9) == 0).any() and masks == [0.3, 0.2, 0.1]
