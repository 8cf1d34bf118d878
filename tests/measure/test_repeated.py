"""Equal blocks are found where one code can serve them, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from upshift.measure import facts
from upshift.measure.repeated import repeated_blocks, repeated_share


class Block(nn.Module):
    def __init__(self, width=4, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))


def named(module):
    names = {id(item): name for name, item in module.named_modules()}
    return [[names[id(block)] for block in group] for group in repeated_blocks(module)]


def test_members_of_one_container_and_the_outermost_only():
    model = nn.ModuleDict(
        {"stem": nn.Linear(4, 4), "h": nn.ModuleList(Block() for _ in range(3)), "out": Block(depth=1)}
    )
    assert named(model) == [["h.0", "h.1", "h.2"]]
    assert named(nn.ModuleList([model])) == [["0.h.0", "0.h.1", "0.h.2"]]
    assert named(Block()) == [["layers.0", "layers.1"]]


def test_classes_and_shapes_part_groups_and_containers_join_them():
    mixed = nn.ModuleList([Block(), Block(8), Block(), nn.Sequential(nn.Linear(4, 4)), Block(8), Block(16)])
    assert named(mixed) == [["0", "2"], ["1", "4"], ["5.layers.0", "5.layers.1"]]
    pair = nn.ModuleDict({"a": nn.Sequential(Block(), Block()), "b": nn.Sequential(Block(), Block())})
    assert named(pair) == [["a", "b"]]
    apart = nn.Module()
    apart.a, apart.b = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block(), Block())
    assert named(apart) == [["a.0", "a.1", "b.0", "b.1", "b.2"]]
    frozen = nn.ModuleList([Scale(), Scale().requires_grad_(False)])
    assert named(frozen) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),  # single layers
        lambda: nn.ModuleList([nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())]),  # nothing is trained in them
        lambda: nn.ModuleList([nn.Sequential(nn.LazyLinear(2)) for _ in range(2)]),
        lambda: nn.ModuleList([Scale()] * 3),  # one block, called three times
        lambda: nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])]),
    ],
)
def test_what_is_no_repeated_block(make):
    assert repeated_blocks(make()) == ()


def test_the_share_counts_layers_once_and_is_a_fact():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Block(depth=3), nn.Sequential(*(Scale() for _ in range(2))))
    model[3].append(model[3][0])
    groups = repeated_blocks(model)
    assert named(model) == [["2.layers.0", "2.layers.1", "2.layers.2"], ["3.0", "3.1"]]
    assert repeated_share(model, groups) == pytest.approx(8 / 10)
    found = facts.model_facts(model)
    assert found.repeated == {"Sequential": 3, "Scale": 2} and found.repeated_share == pytest.approx(8 / 10)
    plain = facts.model_facts(nn.Linear(2, 2))
    assert plain.repeated == {} and plain.repeated_share == 0.0
