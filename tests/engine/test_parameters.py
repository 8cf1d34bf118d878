"""Parameter groups: each parameter once, decay and rates where they belong, against plain torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from upshift.engine.parameters import ParameterGroups, build_optimizer, kinds_of
from upshift.errors import UsageError


class RMSNormOfAnother(nn.Module):
    """A norm of another library, with a gain of two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 8))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.gain = RMSNormOfAnother()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Transformer(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.embed = nn.Embedding(11, 8)
        self.stem = nn.Conv1d(8, 8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.embed.weight


def names_in(model, group):
    names = {id(item): name for name, item in model.named_parameters()}
    return {names[id(item)] for item in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "groups", [ParameterGroups(), ParameterGroups(True, layer_decay=0.5), ParameterGroups(exempt=("position",))]
)
def test_each_trained_parameter_is_in_exactly_one_group(tied, groups):
    model = Transformer(tied)
    model.stem.requires_grad_(False)
    found = [id(item) for group in groups(model) for item in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(item) for item in model.parameters() if item.requires_grad}


def test_norms_and_biases_do_not_decay():
    model = Transformer()
    free, decaying = set(), set()
    for group in ParameterGroups()(model):
        (free if group.get("weight_decay") == 0 else decaying).update(names_in(model, group))
    assert all(name.endswith(("bias", "norm.weight", "gain.weight")) for name in free)
    assert all(name.endswith("weight") or name == "position" for name in decaying)
    assert {"embed.weight", "head.weight", "position", "stem.weight", "blocks.0.attention.in_proj_weight"} <= decaying
    assert "blocks.0.attention.in_proj_bias" in free and "blocks.1.gain.weight" in free


def test_embeddings_and_named_ones_are_exempt_when_asked():
    model = Transformer(tied=True)
    groups = ParameterGroups(embeddings=True, exempt=("position", "blocks.2.mlp.*"))(model)
    free = set().union(*(names_in(model, group) for group in groups if group.get("weight_decay") == 0))
    assert {"embed.weight", "position", "blocks.2.mlp.0.weight"} <= free
    assert "blocks.1.mlp.0.weight" not in free
    with pytest.raises(UsageError, match="no parameter is called 'pos_embed'"):
        ParameterGroups(exempt=("pos_embed",))(model)


def test_the_optimizers_own_rate_and_decay_hold():
    model = Transformer()
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.3), model, ParameterGroups())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert not any({"rate_share", "matrices"} & group.keys() for group in optimizer.param_groups)


def step_once(model, optimizer):
    for index, item in enumerate(model.parameters()):
        item.grad = torch.full_like(item, 0.01 * (index + 1))
    optimizer.step()
    return [item.detach().clone() for item in model.parameters()]


def test_without_exemptions_it_is_the_plain_optimizer_bit_for_bit():
    torch.manual_seed(0)
    first, second = Transformer(), Transformer()
    second.load_state_dict(first.state_dict())
    plain = step_once(first, torch.optim.AdamW(first.parameters(), lr=0.1, weight_decay=0.0))
    grouped = step_once(
        second, build_optimizer(partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0), second, ParameterGroups())
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, grouped, strict=True))


def test_rates_fall_layer_by_layer_towards_the_input():
    model = Transformer()
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=1.0), model, ParameterGroups(layer_decay=0.5))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in names_in(model, group)}
    # BEiT: decay ** (layers + 1 - depth), the stem at depth 0, the head at full rate
    assert rates["position"] == rates["embed.weight"] == rates["stem.weight"] == 0.5**4
    assert rates["blocks.0.mlp.0.weight"] == 0.5**3
    assert rates["blocks.2.norm.bias"] == 0.5
    assert rates["norm.weight"] == rates["head.bias"] == 1.0
    before = model.position.detach().clone()
    model.position.grad = torch.ones_like(before)
    optimizer.step()
    assert torch.equal(before - model.position, torch.full_like(before, 0.5**4))


def test_layers_are_named_or_found_or_asked_for():
    assert ParameterGroups(layer_decay=0.5, layers="blocks.0.mlp")(Transformer())
    with pytest.raises(UsageError, match="no ModuleList") as error:
        ParameterGroups(layer_decay=0.5, layers="encoder")(Transformer())
    assert "blocks" in str(error.value)
    with pytest.raises(UsageError, match="no list of layers"):
        ParameterGroups(layer_decay=0.5)(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="layer_decay is"):
        ParameterGroups(layer_decay=1.5)


def test_kinds():
    kinds = kinds_of(Transformer())
    assert kinds["embed.weight"] == "embedding" and kinds["head.weight"] == "head"
    assert kinds["head.bias"] == kinds["blocks.0.attention.in_proj_bias"] == "vector"
    assert kinds["blocks.0.gain.weight"] == kinds["norm.bias"] == "norm"
    assert kinds["stem.weight"] == kinds["position"] == kinds["blocks.0.mlp.0.weight"] == "matrix"
    tied = kinds_of(Transformer(tied=True))
    assert tied["embed.weight"] == "embedding"
    assert "head" not in tied.values()
    assert kinds_of(nn.Linear(2, 2)) == {"weight": "matrix", "bias": "vector"}


def test_a_frozen_model_is_refused_and_groups_of_ones_own_pass():
    with pytest.raises(UsageError, match="No parameter"):
        build_optimizer(partial(torch.optim.SGD, lr=1.0), nn.Linear(2, 2).requires_grad_(False))
    model = nn.Linear(2, 2)
    own = build_optimizer(partial(torch.optim.SGD, lr=1.0), model, lambda m: [{"params": [m.bias], "lr": 0.25}])
    assert [group["lr"] for group in own.param_groups] == [0.25]
    listed = build_optimizer(partial(torch.optim.SGD, lr=1.0), model, lambda m: m.parameters())
    assert len(listed.param_groups[0]["params"]) == 2
