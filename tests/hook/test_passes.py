"""Epochs and the time of evaluations, as the watch sees them."""

from __future__ import annotations

import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from watched import Keeping, watched

from upshift.hook.passes import Passes
from upshift.hook.peek import rows_of


class Loader:
    def __init__(self, batches, samples):
        self.batches, self.dataset = batches, range(samples)

    def __len__(self):
        return self.batches


def watching(*loaders, waits, timed):
    """A watch over loaders, of which the timed steps fetched so many batches each."""
    return types.SimpleNamespace(
        loaders=[(lambda item=item: item) for item in loaders],
        waits={at: [0.0, batches] for at, batches in enumerate(waits, 1)},
        timed_steps=timed,
    )


@given(st.integers(1, 2000), st.integers(1, 8), st.integers(1, 500))
def test_whole_passes_are_exact(length, accumulated, passes):
    """Of one pass of `length` batches, `accumulated` of them a step, every step timed."""
    steps = max(length * passes // accumulated, 1)
    watch = watching(Loader(length, length * 32), waits=[length * passes], timed=steps)
    found = Passes()
    found.look(watch)
    epochs = found.epochs(watch, steps)
    assert epochs.value == passes and epochs.basis == "measured"


def test_half_a_pass_is_an_estimate():
    watch = watching(Loader(100, 3200), waits=[25], timed=25)
    found = Passes()
    found.look(watch)
    epochs = found.epochs(watch, 250)  # a tenth of the steps were timed
    assert epochs.value == pytest.approx(2.5) and epochs.basis == "estimated"


def test_a_new_loader_each_epoch_adds_up_and_of_two_sets_the_larger_counts():
    new = [Loader(10, 320) for _ in range(3)]
    found = Passes()
    watch = watching(*new, waits=[10, 10, 10], timed=30)
    found.look(watch)
    assert found.epochs(watch, 30).value == 3
    found = Passes()
    watch = watching(Loader(10, 320), Loader(50, 1600), waits=[50, 50], timed=50)
    found.look(watch)
    assert found.epochs(watch, 50).value == 1


class Endless:
    def __len__(self):
        raise TypeError("no length")


@pytest.mark.parametrize("loader", [None, Endless(), Loader(0, 0), object()])
def test_without_a_length_it_is_unknown(loader):
    watch = watching(loader, waits=[5], timed=5)
    found = Passes()
    found.look(watch)
    assert found.epochs(watch, 5) is None
    assert Passes().epochs(watching(waits=[], timed=0), 0) is None


def test_rows_are_those_of_the_first_tensor():
    x, labels = torch.zeros(7, 3), torch.zeros(2)
    assert rows_of((x, labels), {}) == 7 and rows_of((), {"mask": None, "x": x}) == 7
    for nothing in ((), (3,), ({"x": x},), (torch.zeros(()),)):
        assert math.isnan(rows_of(nothing, {}))


def trained(epochs, evaluate, sleep=False):
    """A small training under a watch: its passes, the watch and the steps."""
    x = torch.randn(64, 4)
    data = DataLoader(TensorDataset(x[:48]), batch_size=8)
    held = DataLoader(TensorDataset(x[48:]), batch_size=8)
    model = torch.nn.Linear(4, 1)
    passes = Passes()
    with watched(Keeping()) as controller:
        watch = controller.watch
        watch.on_span, watch.may_sleep = passes.timed.add, sleep
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(epochs):
            for (batch,) in data:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                evaluate(model, batch, None)
            passes.look(watch)
            model.eval()
            evaluate(model, None, held)
            model.train()
        watch.flush()
    return passes, watch, epochs * 6


def over(model, batch, held):
    if held is not None:
        with torch.no_grad():
            for (item,) in held:
                model(item)


@pytest.mark.parametrize("sleep", [False, True])
def test_a_real_training_has_its_epochs_and_evaluations(sleep):
    passes, watch, steps = trained(20, over, sleep)
    epochs = passes.epochs(watch, steps)
    assert epochs.value == pytest.approx(20, rel=0.15 if sleep else 1e-12)
    assert passes.timed.evaluations == 20 and passes.timed.found.n == 19
    assert passes.inference(steps).found.value > 0


def test_a_teacher_in_every_step_is_no_evaluation():
    def teach(model, batch, held):
        if batch is not None:
            with torch.no_grad():
                model(batch)

    passes, _, steps = trained(3, teach)
    assert passes.timed.evaluations >= steps - 3 and passes.inference(steps) is None
