"""Optimizers by name: the same as the classes they stand for, one state dict, no trace of an evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from upshift.engine.optimizers import KNOWN, evaluating, optimizer
from upshift.engine.parameters import ParameterGroups, build_optimizer
from upshift.errors import MissingExtraError, UsageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 9)

    def forward(self, x):
        return self.head(self.norm(self.second(torch.relu(self.first(self.embed(x))))))


def made():
    torch.manual_seed(3)
    return Net()


def train(model, optimizer, begin=0, end=6, between=None):
    for step in range(begin, end):
        x = torch.randint(0, 9, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x).backward()
        optimizer.step()
        if between:
            between()
    return [item.detach().clone() for item in model.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OF_TORCH = [name for name, (module, *_) in KNOWN.items() if module == "torch.optim" and name != "muon"]


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_name_of_torch_is_torchs_class_bit_for_bit(name):
    first, second = made(), made()
    ours = train(first, optimizer(name.upper(), lr=0.01)(first.parameters()))
    theirs = train(second, getattr(torch.optim, KNOWN[name][1])(second.parameters(), lr=0.01))
    assert equal(ours, theirs)


def test_every_name_has_a_class_in_torch_or_an_extra():
    assert all(extra in ("torch", "optimizers", "lowbit") for _, _, extra in KNOWN.values())
    assert all(hasattr(torch.optim, KNOWN[name][1]) for name in [*OF_TORCH, "muon"])


def test_names_and_settings_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="No optimizer is called 'adamm'") as error:
        optimizer("adamm")
    assert "adamw" in error.value.remedy
    with pytest.raises(UsageError, match="has no 'learning_rate'") as error:
        optimizer("adamw", learning_rate=0.1)(made().parameters())
    assert "lr" in error.value.remedy and "fused" not in error.value.remedy
    with pytest.raises(UsageError, match="fused: how a step is computed"):
        optimizer("adamw", lr=0.1, fused=True)
    with pytest.raises(UsageError, match="has no 'betas'"):
        optimizer("muon", betas=(0.9, 0.99))(made().parameters())


def test_a_missing_package_names_the_extra(monkeypatch):
    import importlib

    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", missing)
    for name, extra in (("lamb", "optimizers"), ("adamw_8bit", "lowbit")):
        with pytest.raises(MissingExtraError) as error:
            optimizer(name, lr=0.1)(made().parameters())
        assert f"upshift[{extra}]" in error.value.remedy


def test_what_it_is_called_is_stable():
    assert repr(optimizer("AdamW", lr=3e-4, betas=(0.9, 0.95))) == "adamw(lr=0.0003, betas=(0.9, 0.95))"


# -- Muon and AdamW ---------------------------------------------------------------------------------------------------


def two_optimizers(model, muon, adamw, hidden):
    """The same by hand: two optimizers of torch, stepped one after the other."""
    rest = [item for item in model.parameters() if not any(item is other for other in hidden)]

    class Both:
        parts = (torch.optim.Muon(hidden, **muon), torch.optim.AdamW(rest, **adamw))

        def zero_grad(self):
            for part in self.parts:
                part.zero_grad()

        def step(self):
            for part in self.parts:
                part.step()

    return Both()


@pytest.mark.parametrize("groups", [None, ParameterGroups()])
def test_muon_takes_hidden_matrices_and_adamw_the_rest(groups):
    first, second = made(), made()
    built = build_optimizer(optimizer("muon", lr=0.02, weight_decay=0.0), first, groups)
    by_hand = two_optimizers(
        second,
        {"lr": 0.02, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.02, "weight_decay": 0.0},
        [second.first.weight, second.second.weight],
    )
    assert equal(train(first, built), train(second, by_hand))
    assert isinstance(built, torch.optim.Optimizer)


def test_muon_with_a_rate_for_adamw_takes_its_original_scale():
    first, second = made(), made()
    settings = {"lr": 3e-4, "betas": (0.8, 0.9), "weight_decay": 0.1}
    built = build_optimizer(optimizer("muon", lr=0.05, momentum=0.9, adamw=settings), first)
    by_hand = two_optimizers(
        second, {"lr": 0.05, "momentum": 0.9}, settings, [second.first.weight, second.second.weight]
    )
    assert equal(train(first, built), train(second, by_hand))
    with pytest.raises(UsageError, match="does not fit AdamW"):
        optimizer("muon", lr=0.05, adjust_lr_fn="original")(made().parameters())


def test_muon_without_a_model_takes_every_matrix_and_wants_one():
    model = made()
    built = optimizer("muon", lr=0.02)(model.named_parameters())
    muon = [item for group in built.param_groups if group["uses"] == "muon" for item in group["params"]]
    assert len(muon) == 4 and all(item.ndim == 2 for item in muon)
    with pytest.raises(UsageError, match="2-D weights"):
        optimizer("muon", lr=0.02)([nn.Parameter(torch.zeros(3))])


def test_muon_is_one_optimizer_for_state_dicts_rates_and_resume():
    def new():
        model = made()
        return model, build_optimizer(optimizer("muon", lr=0.02), model, ParameterGroups())

    whole, first = new()
    expected = train(whole, first)
    model, second = new()
    train(model, second, end=3)
    states = copy.deepcopy((model.state_dict(), second.state_dict()))
    assert {len(entry) for entry in states[1]["state"].values()} == {1, 3}  # momentum; two moments and the step
    again, third = new()
    again.load_state_dict(states[0])
    third.load_state_dict(states[1])
    assert equal(train(again, third, begin=3), expected)

    for group in third.param_groups:
        group["lr"] = 0.0
    third.zero_grad(set_to_none=True)
    before = [item.detach().clone() for item in again.parameters()]
    assert equal(train(again, third, begin=6, end=7), before), "a rate that is set acts on both parts"


def test_exempt_parameters_do_not_decay_under_muon_either():
    model = made()
    built = build_optimizer(optimizer("muon", lr=0.02, weight_decay=0.3), model, ParameterGroups(exempt=("first.*",)))
    decay = {id(item): group["weight_decay"] for group in built.param_groups for item in group["params"]}
    assert decay[id(model.first.weight)] == decay[id(model.norm.weight)] == decay[id(model.second.bias)] == 0
    assert decay[id(model.second.weight)] == decay[id(model.embed.weight)] == decay[id(model.head.weight)] == 0.3


# -- evaluation weights -----------------------------------------------------------------------------------------------


class Elsewhere(torch.optim.SGD):
    """Evaluates at another point, and comes back with a rounding error, as schedule-free optimizers do."""

    def eval(self):
        for item in self.param_groups[0]["params"]:
            item.data.lerp_(torch.ones_like(item), 1 - 1 / 0.9)

    def train(self):
        for item in self.param_groups[0]["params"]:
            item.data.lerp_(torch.ones_like(item), 1 - 0.9)


def test_an_evaluation_leaves_no_trace():
    first, second = made(), made()
    plain = train(first, Elsewhere(first.parameters(), lr=0.1))
    other = Elsewhere(second.parameters(), lr=0.1)
    seen = []

    def between():
        before = second.head.weight.detach().clone()
        with evaluating(other):
            seen.append(not torch.equal(before, second.head.weight))

    assert equal(train(second, other, between=between), plain)
    assert all(seen)
    ordinary = torch.optim.SGD(first.parameters(), lr=0.1)
    with evaluating(ordinary):
        assert equal([item.detach() for item in first.parameters()], plain)


# -- other packages ---------------------------------------------------------------------------------------------------

LIBRARY = [name for name, (module, *_) in KNOWN.items() if module == "pytorch_optimizer"]
LOW_BIT = [name for name, (module, *_) in KNOWN.items() if module == "torchao.optim"]


@pytest.mark.extra
@pytest.mark.parametrize("name", LIBRARY)
def test_the_librarys_optimizers_train_and_resume(name):
    library = pytest.importorskip("pytorch_optimizer")
    rate = {"prodigy": 1.0, "lars": 1.0}.get(name, 0.01)

    def new():
        model = made()
        return model, build_optimizer(optimizer(name, lr=rate), model, ParameterGroups())

    whole, first = new()
    expected = train(whole, first, end=10)
    assert isinstance(first, getattr(library, KNOWN[name][1]))
    assert all(torch.isfinite(item).all() for item in expected)
    assert not equal(expected, [item.detach() for item in made().parameters()])
    model, second = new()
    train(model, second, end=4)
    states = copy.deepcopy((model.state_dict(), second.state_dict()))
    again, third = new()
    again.load_state_dict(states[0])
    third.load_state_dict(states[1])
    assert equal(train(again, third, begin=4, end=10), expected)


@pytest.mark.extra
@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_schedule_free_is_evaluated_without_a_trace(name):
    pytest.importorskip("pytorch_optimizer")
    ends, moved = [], []
    for evaluate in (False, True):
        model = made()
        built = optimizer(name, lr=0.1)(model.parameters())

        def between(model=model, built=built, evaluate=evaluate):
            if evaluate:
                before = model.head.weight.detach().clone()
                with evaluating(built):
                    assert built.param_groups[0]["train_mode"] is False
                    moved.append(not torch.equal(before, model.head.weight))

        ends.append(train(model, built, between=between))
    assert any(moved)
    assert equal(*ends)


class Wide(nn.Module):
    """Weights of at least 4,096 values, which torchao keeps in few bits, and small ones, which it does not."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9))

    def forward(self, x):
        return self.net(nn.functional.one_hot(x, 64).float())


@pytest.mark.extra
@pytest.mark.parametrize("name", LOW_BIT)
def test_states_of_few_bits_are_stored_as_plain_tensors_and_resume(name, monkeypatch):
    pytest.importorskip("torchao")
    # What is computed is the same without a compiler, and nothing here is about speed.
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    from upshift.checkpoint.tree import join, split

    def new():
        torch.manual_seed(3)
        model = Wide()
        return model, optimizer(name, lr=0.01)(model.parameters())

    whole, first = new()
    expected = train(whole, first)
    assert first.param_groups[0]["lr"].item() == pytest.approx(0.01)
    assert type(first.state[whole.net[0].weight]["exp_avg"]).__name__.startswith("OptimState")
    model, second = new()
    train(model, second, end=3)
    saved = {"model": copy.deepcopy(model.state_dict()), "optimizer": second.state_dict()}
    stored = join(*split(saved))
    again, third = new()
    again.load_state_dict(stored["model"])
    third.load_state_dict(stored["optimizer"])
    assert equal(train(again, third, begin=3), expected)
