"""The watch: how many steps, and which phase every second belongs to, against a ledger kept by the script itself."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from watched import Keeping, Ledger, watched

# -- parts that work on the ledger's clock ----------------------------------------------------------------------------


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(context, x, ledger):
        context.ledger = ledger
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        context.ledger.work("backward")
        return gradient, None


class Busy(nn.Module):
    """A layer that takes time in forward and backward; `phase` is where its forward belongs."""

    def __init__(self, ledger, phase="forward"):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.ledger, self.phase = ledger, phase

    def forward(self, x):
        self.ledger.work(self.phase)
        return _Backward.apply(self.linear(x), self.ledger)


class Criterion(nn.Module):
    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger

    def forward(self, x):
        self.ledger.work("loss")
        return x.square().mean()


class Rows(Dataset):
    def __init__(self, ledger, phase, n):
        self.ledger, self.phase, self.n = ledger, phase, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.ledger.work(self.phase)
        return torch.full((3,), float(i))


class Slow(torch.optim.Optimizer):
    def __init__(self, ledger, *modules):
        super().__init__([p for module in modules for p in module.parameters()], {"lr": 0.01})
        self.ledger = ledger

    def step(self, closure=None):
        self.ledger.work("optimizer")
        loss = closure() if closure is not None else None
        self.ledger.work("optimizer")
        return loss


class Parcel:
    """Takes time to be pickled."""

    def __init__(self, ledger):
        self.ledger = ledger

    def __reduce__(self):
        self.ledger.work("checkpoint")
        return (int, ())


# -- loops made of ingredients ----------------------------------------------------------------------------------------


def endless(loader):
    while True:
        yield from loader


def train(ledger, kind, loader, teacher, micro, events):
    """A training loop of `len(events)` steps; every second is booked where it belongs."""
    model, criterion = Busy(ledger), Criterion(ledger)
    wise = Busy(ledger, "nograd").eval()
    batches = endless(DataLoader(Rows(ledger, "data", 4), batch_size=1)) if loader else None
    generator = Busy(ledger) if kind.startswith("gan") else None
    optimizer = Slow(ledger, model)
    second = Slow(ledger, generator) if generator is not None else None

    def loss_of(x):
        out = model(x)
        ledger.work("loss")
        return criterion(out)

    def forward_backward():
        x = next(batches) if batches is not None else torch.ones(1, 3)
        if teacher == "before":
            with torch.no_grad():
                wise(x)
        ledger.work("other")
        loss = loss_of(x)
        if teacher == "after":
            with torch.no_grad():
                wise(x)
            ledger.work("loss")
        loss.backward()

    for event in events:
        if kind == "closure":

            def closure():
                optimizer.zero_grad()
                # Work of the closure outside model, loss and backward is the optimizer's.
                loss = loss_of(torch.ones(1, 3))
                loss.backward()
                return loss

            optimizer.step(closure)
        elif second is not None:
            for _ in range(int(kind[3:])):
                optimizer.zero_grad()
                forward_backward()
                optimizer.step()
            ledger.work("other")
            second.zero_grad()
            criterion(model(generator(torch.ones(1, 3)))).backward()
            second.step()
        else:
            optimizer.zero_grad()
            for _ in range(micro):
                forward_backward()
            ledger.work("other")
            optimizer.step()
        ledger.step_ended()
        happens(ledger, event, model)


def happens(ledger, event, model):
    """What some scripts do between two steps."""
    if event == "save":
        torch.save(Parcel(ledger), io.BytesIO())
        return
    if event in ("evaluate", "sloppy", "inside"):
        model.phase = "nograd"
        model.eval()
        with torch.set_grad_enabled(event != "evaluate"):
            for x in DataLoader(Rows(ledger, "nograd", 2), batch_size=1):
                with torch.set_grad_enabled(event == "sloppy"):
                    model(x)
                    ledger.work("nograd")
                    nn.MSELoss()(x, x)
        model.train()
        model.phase = "forward"
    ledger.work("other")


PHASES = ("data", "forward", "loss", "backward", "optimizer", "nograd", "checkpoint")
KINDS = st.sampled_from(["sgd", "closure", "gan1", "gan3"])
EVENTS = st.lists(st.sampled_from(["none", "none", "evaluate", "sloppy", "save"]), min_size=2, max_size=7)


@settings(max_examples=120, deadline=None)
@given(
    kind=KINDS,
    loader=st.booleans(),
    teacher=st.sampled_from(["none", "before", "after"]),
    micro=st.integers(1, 3),
    events=EVENTS,
    durations=st.lists(st.integers(1, 9), min_size=1, max_size=7),
)
def test_every_second_of_any_loop_is_in_its_phase(kind, loader, teacher, micro, events, durations):
    # Evaluation and a teacher that follows it with nothing of the training between are one stretch.
    assume(teacher != "before" or loader)
    ledger = Ledger(tuple(durations))
    with watched(clock=ledger) as seen:
        train(ledger, kind, loader, teacher, micro, events)
    assert len(seen.records) == len(events)
    for record, booked in zip(seen.records, ledger.steps, strict=True):
        got = {name: getattr(record, name) for name in PHASES}
        assert got == {name: booked[name] for name in PHASES}
        assert sum(got.values()) <= record.total
        if record.number:  # the first step begins with the first work, whatever came before
            assert record.total == sum(booked.values())
    assert [record.number for record in seen.records] == list(range(len(events)))


def test_evaluation_with_gradients_off_inside_the_loop_costs_one_batch_of_doubt():
    ledger = Ledger((2,))
    with watched(clock=ledger) as seen:
        train(ledger, "sgd", True, "none", 1, ["inside", "none", "inside", "none", "none"])
    wrong = [record.data - booked["data"] for record, booked in zip(seen.records, ledger.steps, strict=True)]
    # Each evaluation here has a loader of its own, and its first batch cannot be told from a training batch.
    assert wrong == [0, 2, 0, 2, 0]
    assert seen.records[1].nograd == ledger.steps[1]["nograd"] - 2


def test_training_set_that_is_also_evaluated():
    ledger = Ledger((3,))
    with watched(clock=ledger) as seen:
        model, criterion = Busy(ledger), Criterion(ledger)
        optimizer = Slow(ledger, model)
        rows = Rows(ledger, "data", 2)
        loader = DataLoader(rows, batch_size=1)
        for _ in range(3):
            for x in loader:
                criterion(model(x)).backward()
                optimizer.step()
                ledger.step_ended()
            rows.phase = model.phase = "nograd"
            model.eval()
            with torch.no_grad():
                for x in loader:
                    model(x)
            model.train()
            rows.phase, model.phase = "data", "forward"
    assert [record.data for record in seen.records] == [booked["data"] for booked in ledger.steps] == [3] * 6
    assert [record.nograd for record in seen.records] == [0, 0, 12, 0, 12, 0]


# -- steps ------------------------------------------------------------------------------------------------------------


def steps(body, n=5):
    with watched() as seen:
        body(n)
    return len(seen.records)


def small():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def once(model, optimizer, step=True):
    optimizer.zero_grad()
    loss = model(torch.ones(1, 2)).square().mean()
    loss.backward()
    if step:
        optimizer.step()
    return loss


def test_training_in_evaluation_mode_is_no_evaluation():
    with watched() as seen:
        model, optimizer = small()
        model.eval()
        for _ in range(6):
            once(model, optimizer)
    assert [record.nograd_calls for record in seen.records[1:]] == [0] * 5
    assert all(record.forward > 0 for record in seen.records[1:])


def test_frozen_network_in_the_loss_does_not_hide_a_sloppy_evaluation():
    ledger = Ledger((1,))
    with watched(clock=ledger) as seen:
        model, frozen = Busy(ledger), Busy(ledger).eval().requires_grad_(False)
        optimizer = Slow(ledger, model)
        for step in range(6):
            (frozen(model(torch.ones(1, 3)))).square().mean().backward()
            optimizer.step()
            if step == 3:
                model.eval()
                model(torch.ones(1, 3))
                model.train()
    assert [record.nograd for record in seen.records[1:]] == [0, 0, 0, 1, 0]
    assert [record.forward for record in seen.records[1:]] == [2] * 5


def test_optimizer_that_is_never_used_delays_the_first_steps_only():
    def body(n):
        model, optimizer = small()
        idle = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        for _ in range(n):
            once(model, optimizer)
        assert idle

    assert steps(body, 60) == 60 - 16


def test_second_optimizer_that_is_dropped():
    def body(n):
        for _ in range(n):
            model, optimizer = small()
            for _ in range(3):
                once(model, optimizer)
            del model, optimizer

    assert steps(body) == 15


def test_wrapped_optimizer_ends_one_step():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, {})

        def step(self, closure=None):
            self.inner.step()

    class Chatty(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    def wrapped(n):
        model, inner = small()
        outer = Lookahead(inner)
        for _ in range(n):
            once(model, outer)

    def chatty(n):
        model = nn.Linear(2, 1)
        optimizer = Chatty(model.parameters(), lr=0.1)
        for _ in range(n):
            once(model, optimizer)

    assert steps(wrapped) == 5
    assert steps(chatty) == 5


def test_step_of_a_subclass_is_timed_whole():
    ledger = Ledger((1,))

    class Base(torch.optim.SGD):
        def step(self, closure=None):
            ledger.work("optimizer")

    class Derived(Base):
        def step(self, closure=None):
            ledger.work("optimizer")
            super().step()
            ledger.work("optimizer")

    with watched(clock=ledger) as seen:
        model = nn.Linear(2, 1)
        Base(model.parameters(), lr=0.1)  # from now on `Base.step` calls the hooks too
        optimizer = Derived(model.parameters(), lr=0.1)
        for _ in range(3):
            once(model, optimizer)
    assert [record.optimizer for record in seen.records] == [3, 3, 3]


def test_step_that_raised_is_forgotten():
    def body(n):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters())
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(n):
            once(model, optimizer, step=False)
            if i == 2:
                model.weight.grad = torch.zeros(1, 2).to_sparse()
                with pytest.raises(RuntimeError, match="sparse"):
                    optimizer.step()
            else:
                optimizer.step()
            other.step()

    # The step that failed ends together with the next one.
    assert steps(body, 8) == 7


def test_backward_that_raised_leaves_nothing_open():
    def body(n):
        model, optimizer = small()
        for _ in range(n):
            with pytest.raises(RuntimeError):
                model(torch.ones(3, 2)).backward()
            with pytest.raises(RuntimeError):
                model(torch.ones(1, 5))
            once(model, optimizer)

    with watched() as seen:
        body(4)
    assert len(seen.records) == 4
    assert all(len(record.losses) == 1 for record in seen.records)
    assert all(record.forward > 0 and record.backward > 0 for record in seen.records)


def test_checkpointed_layers_are_no_roots():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=False))

    with watched() as seen:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            once(model, optimizer)
        assert [ref() for ref in seen.watch.models] == [model]
    assert [record.calls for record in seen.records] == [1, 1, 1]


def test_network_inside_a_dataset_is_no_evaluation():
    class Features(Dataset):
        net = nn.Linear(2, 2)

        def __len__(self):
            return 4

        def __getitem__(self, i):
            with torch.no_grad():
                return self.net(torch.ones(2))

    with watched() as seen:
        model, optimizer = small()
        for x in DataLoader(Features(), batch_size=1):
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
    assert [record.batches for record in seen.records] == [1] * 4
    assert [record.nograd for record in seen.records] == [0] * 4
    assert all(record.data > 0 for record in seen.records)


def test_other_threads_are_left_alone():
    with watched() as seen:
        model, optimizer = small()
        once(model, optimizer)
        thread = threading.Thread(target=lambda: [once(*small()) for _ in range(3)])
        thread.start()
        thread.join()
        once(model, optimizer)
    assert len(seen.records) == 2


def test_training_thread_is_followed():
    with watched() as seen:
        thread = threading.Thread(target=lambda: [once(*pair) for pair in [small()] * 6])
        thread.start()
        thread.join()
    assert len(seen.records) == 6
    assert all(record.forward > 0 for record in seen.records[1:])


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (lambda x: x.sum().backward(), (4.0,)),
        (lambda x: torch.autograd.backward([x.sum(), (2 * x).sum()]), (12.0,)),
        (lambda x: torch.autograd.backward((x.sum(),), retain_graph=True), (4.0,)),
        (lambda x: x.backward(torch.ones(4)), ()),
        (lambda x: torch.autograd.backward(torch.autograd.graph.get_gradient_edge(x.sum())), ()),
        (lambda x: torch.autograd.backward(item for item in [x.sum()]), ()),
        (lambda x: (x.sum() * 1j).backward(torch.tensor(1j)), ()),
        (lambda x: x.sum().double().backward(), (4.0,)),
        (lambda x: x.sum().bfloat16().reshape(1).backward(), (4.0,)),
    ],
)
def test_losses_of_both_entry_points(start, expected):
    with watched() as seen:
        parameter = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        start(parameter * 1)
        optimizer.step()
    assert seen.records[0].losses == expected


def test_losses_keep_no_graph_alive():
    import weakref

    with watched() as seen:
        parameter = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        loss = parameter.sum()
        node = weakref.ref(loss)
        loss.backward(retain_graph=True)
        del loss
        assert node() is None
        optimizer.step()
    assert seen.records[0].losses == (4.0,)


def test_create_graph_is_seen():
    with watched() as seen:
        parameter = nn.Parameter(torch.ones(4))
        (slope,) = torch.autograd.grad(parameter.square().sum(), parameter, create_graph=True)
        assert seen.watch.create_graph and seen.watch.grad_only
        slope.sum().backward()
        assert parameter.grad.tolist() == [2.0] * 4


# -- putting back -----------------------------------------------------------------------------------------------------

PATCHED = [
    (nn.Module, "__call__"), (torch.autograd, "backward"), (torch.autograd, "grad"), (torch, "save"),
    (torch.serialization, "save"), (DataLoader, "__init__"), (DataLoader, "__iter__"),
    (torch.utils.data.dataloader._BaseDataLoaderIter, "__next__"), (torch.optim.Optimizer, "__init__"),
]  # fmt: skip


def test_everything_is_put_back():
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    before = [vars(owner)[name] for owner, name in PATCHED]
    with watched() as seen:
        assert [vars(owner)[name] is old for (owner, name), old in zip(PATCHED, before, strict=True)] == [False] * 9
        assert len(seen.watch.patches.names()) == 9
        assert _global_optimizer_pre_hooks and _global_optimizer_post_hooks
    assert all(vars(owner)[name] is old for (owner, name), old in zip(PATCHED, before, strict=True))
    assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks


def test_patch_of_somebody_else_over_ours_stays():
    with watched():
        ours = torch.save

        def theirs(*args):
            return ours(*args)

        torch.save = theirs
    try:
        assert torch.save is theirs
        torch.save(1, io.BytesIO())
    finally:
        torch.save = torch.serialization.save


def test_wrappers_look_like_what_they_wrap():
    import inspect

    names = [(getattr(owner, name).__name__, inspect.signature(getattr(owner, name))) for owner, name in PATCHED]
    with watched():
        same = [(getattr(owner, name).__name__, inspect.signature(getattr(owner, name))) for owner, name in PATCHED]
    assert same == names


def test_models_are_forgotten_with_their_owner():
    with watched() as seen:
        for _ in range(20):
            model, optimizer = small()
            once(model, optimizer)
        watch = seen.watch
        del model, optimizer
        assert not watch._active and not watch._around and not watch._guards and not watch.shapes


def test_copies_of_watched_models_are_plain():
    with watched():
        model, optimizer = small()
        once(model, optimizer)
        twin = copy.deepcopy(model)
    assert type(twin) is nn.Linear and set(vars(twin)) == set(vars(model))
    assert torch.equal(twin.weight, model.weight)


def test_symbolic_tracing_still_works():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    plain = str(torch.fx.symbolic_trace(model).graph)
    with watched():
        assert str(torch.fx.symbolic_trace(model).graph) == plain
        scripted = torch.jit.trace(model, torch.ones(1, 2))
    assert torch.equal(scripted(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_watch_is_inert_in_a_forked_child():
    import os

    with watched(Keeping()) as seen:
        model, optimizer = small()
        once(model, optimizer)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            clean = torch.autograd.backward is torch.autograd.__dict__["backward"] and not seen.watch.patches.names()
            os.write(send, b"clean" if clean else b"patched")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(receive, 10) == b"clean"
        once(model, optimizer)
    assert len(seen.records) == 2


def test_cost_of_watching_is_estimated_without_a_trace():
    from upshift.hook.overhead import watching_cost

    with watched() as seen:
        model, optimizer = small()
        for _ in range(5):
            once(model, optimizer)
        watch = seen.watch
        before = {name: getattr(watch, name) for name in ("forward", "accounted", "inner", "calls", "index", "steps")}
        cost = watching_cost(watch, torch, seen.records)
        assert {name: getattr(watch, name) for name in before} == before
        assert [ref() for ref in watch.models] == [model]
        once(model, optimizer)
    # Four events a step at some microseconds each; a millisecond would be a mistake of unit.
    assert 1e-7 < cost < 1e-3
    assert len(seen.records) == 6


# -- steps that are only counted --------------------------------------------------------------------------------------


class Summing(Keeping):
    """Sums over windows, as a run without techniques keeps them."""

    window = 50.0

    def torch_ready(self, torch):
        self.watch.may_sleep = True


@pytest.fixture
def sleepy(monkeypatch):
    """Naps begin early, and no step is too long for them."""
    from upshift.hook import books

    monkeypatch.setattr(books, "AWAKE_STEPS", 2)
    monkeypatch.setattr(books, "NAP", 60.0)
    return books


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=KINDS,
    loader=st.booleans(),
    teacher=st.sampled_from(["none", "before", "after"]),
    micro=st.integers(1, 2),
    events=st.lists(st.sampled_from(["none", "none", "none", "evaluate", "sloppy", "save"]), min_size=20, max_size=40),
)
def test_steps_only_counted_keep_counts_totals_and_evaluation(sleepy, kind, loader, teacher, micro, events):
    assume(teacher != "before" or loader)
    ledger = Ledger((2,))
    with watched(Summing(), clock=ledger) as seen:
        events = [*events, "none"]  # what follows the last step is in no step
        train(ledger, kind, loader, teacher, micro, events)
        assert seen.watch.index == len(events)
        seen.watch.flush()
    assert sum(record.steps for record in seen.records) == len(events)
    timed = sum(record.timed for record in seen.records)
    if teacher != "none" and kind != "closure":
        assert timed == len(events)  # work without gradients in every step keeps the books awake
    booked = sum(ledger.steps[1:], Counter())
    first = seen.records[0].total
    assert sum(record.total for record in seen.records) == first + sum(booked.values())
    assert sum(record.checkpoint for record in seen.records) == sum(step["checkpoint"] for step in ledger.steps)
    # Only the batch that precedes an evaluation in a loader met before may be missed; new iterators are always seen.
    assert sum(record.nograd for record in seen.records) == sum(step["nograd"] for step in ledger.steps)


def test_phases_are_scaled_up_from_the_steps_timed(sleepy):
    ledger = Ledger((1,))
    with watched(Summing(), clock=ledger) as seen:
        train(ledger, "sgd", False, "none", 1, ["none"] * 200)
        seen.watch.flush()
    later = [record for record in seen.records if record.number > 2]
    assert sum(record.timed for record in later) < 200 / 5
    assert sum(record.timed for record in later) > 200 / 20
    for record in later:
        if not record.timed:
            continue
        for name, each in (("forward", 1), ("loss", 2), ("backward", 1), ("optimizer", 2)):
            assert getattr(record, name) == pytest.approx(each * record.steps)
    assert sum(record.steps for record in seen.records) == 200


def test_long_steps_are_all_timed():
    ledger = Ledger((1,))
    with watched(Summing(), clock=ledger) as seen:
        train(ledger, "sgd", True, "none", 1, ["none"] * 60)
        seen.watch.flush()
    assert sum(record.timed for record in seen.records) == 60


def test_sleep_ends_for_wrapped_optimizers_and_leaves_roots_alone(sleepy):
    class Chatty(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=False))

    with watched(Summing()) as seen:
        plain = nn.Linear(2, 1)
        once(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        model = Net()
        optimizer = Chatty(model.parameters(), lr=0.1)
        for _ in range(30):
            once(model, optimizer)
        assert seen.watch.index == 31 and not seen.watch.may_sleep
    with watched(Summing()) as seen:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(30):
            once(model, optimizer)
        assert seen.watch.index == 30 and seen.watch.may_sleep
        assert [ref() for ref in seen.watch.models] == [model]


def test_the_end_of_an_epoch_is_no_batch():
    model = nn.Linear(2, 1)
    with watched(Keeping()) as seen:
        train_loader = DataLoader(torch.randn(8, 2), batch_size=2)
        eval_loader = DataLoader(torch.randn(4, 2), batch_size=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for batch in train_loader:
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
            with torch.no_grad():
                for batch in eval_loader:
                    model(batch)
        once(model, optimizer)  # what follows the last step is in no step
    assert sum(record.batches for record in seen.records) == 12
    assert not seen.watch.evaluation_only(train_loader) and seen.watch.evaluation_only(eval_loader)
    assert seen.watch.waited(train_loader)[1] == 12
