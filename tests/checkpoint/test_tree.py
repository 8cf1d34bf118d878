"""A state, taken apart and put together: the same values, types, ties and memory formats; anything else is refused."""

from __future__ import annotations

import math
import random
from collections import OrderedDict

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from upshift.checkpoint.tree import join, split
from upshift.errors import CheckpointError
from upshift.testing.crashes import same


def there_and_back(tree):
    skeleton, tensors = split(tree)
    apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return join(msgspec.json.decode(msgspec.json.encode(skeleton)), apart)


def equal(a, b):
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return same(a, b)


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
TENSORS = st.builds(
    lambda dtype, shape: torch.randint(0, 2, shape).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex128, torch.uint8]),
    st.lists(st.integers(0, 3), max_size=3),
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(2**64, 2**200), st.floats(), TEXT,
                   st.binary(max_size=8), TENSORS)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(TEXT, st.integers()), inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=150, deadline=None)
def test_round_trip(tree):
    assert equal(tree, there_and_back(tree))


def test_tied_weights_are_written_once_and_come_back_tied():
    weight = torch.randn(4, 3)
    skeleton, tensors = split({"model": {"in": weight, "out": weight.view(4, 3), "other": weight.clone()}})
    assert list(tensors) == ["model.in", "model.other"]
    back = join(skeleton, {name: tensor.clone() for name, tensor in tensors.items()})["model"]
    assert back["in"] is back["out"]
    back["in"][0, 0] = 7.0
    assert back["out"][0, 0] == 7.0 and back["other"][0, 0] != 7.0


def test_views_of_one_storage_share_it_again():
    memory = torch.arange(100, dtype=torch.float32)
    tree = {
        "flat": memory[10:90],
        "weight": memory[10:50].view(8, 5),
        "bias": memory[50:90:2],
        "t": memory[10:16].view(2, 3).T,
    }
    skeleton, tensors = split(tree)
    assert list(tensors) == ["flat"] and tensors["flat"].numel() == 80 * 4
    back = there_and_back(tree)
    assert all(torch.equal(tree[key], back[key]) and tree[key].stride() == back[key].stride() for key in tree)
    back["flat"].zero_()
    assert not back["weight"].any() and not back["bias"].any() and not back["t"].any()
    assert skeleton["dict"]["bias"]["stride"] == [2]


def test_two_dtypes_on_one_storage_at_odd_bytes():
    memory = torch.arange(32, dtype=torch.uint8)
    tree = {"bytes": memory[3:30], "words": memory[4:20].view(torch.int32)}
    assert equal(tree, there_and_back(tree))


def test_an_expanded_tensor_takes_its_memory_not_its_shape():
    skeleton, tensors = split([torch.ones(1).expand(2**40)])
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 4
    assert join(skeleton, tensors)[0].shape == (2**40,)


def test_a_part_of_a_large_tensor_takes_only_its_part():
    _, tensors = split({"head": torch.randn(1000, 10)[:2]})
    assert tensors["head"].shape == (2, 10)


@pytest.mark.parametrize("strange", [torch.channels_last, None])
def test_memory_formats_come_back(strange):
    image = torch.randn(2, 3, 4, 5)
    image = image.to(memory_format=strange) if strange else image.permute(3, 0, 2, 1)
    back = there_and_back({"x": image})["x"]
    assert torch.equal(back, image) and back.stride() == image.stride()


def test_keys_that_would_meet_in_one_name_do_not():
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.full((1,), 2.0)}
    assert equal(tree, there_and_back(tree))
    assert "__metadata__" not in split(tree)[1]


def test_a_state_dict_keeps_the_versions_of_its_modules():
    model = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(3, 3)), torch.nn.BatchNorm1d(3))
    back = there_and_back(model.state_dict())
    assert type(back) is OrderedDict and back._metadata == dict(model.state_dict()._metadata)
    model.load_state_dict(back)


def test_parameters_come_back_as_plain_tensors_without_gradient():
    parameter = torch.nn.Parameter(torch.randn(3))
    back = there_and_back([parameter])[0]
    assert type(back) is torch.Tensor and not back.requires_grad and torch.equal(back, parameter)


def test_an_optimizer_and_the_random_states_come_back():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), fused=True)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tree = {
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {"state": int(np.random.PCG64(1).state["state"]["state"])},
    }
    back = there_and_back(tree)
    assert equal(tree, back)
    optimizer.load_state_dict(back["optimizer"])
    random.setstate(back["python"])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        ({1, 2}, "set"),
        (object(), "object"),
        (torch.zeros(2).to_sparse(), "layout"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.Size([1]), "torch.Size"),
        (2**5000, "5001 bits"),
        ({1.5: 0}, "key of type float"),
        ({True: 0}, "key of type bool"),
    ],
)
def test_other_types_are_refused_by_path(value, named):
    with pytest.raises(CheckpointError, match=r"\['optimizer'\]\[1\]") as caught:
        split({"optimizer": [0, value]})
    assert named in caught.value.message


def test_a_state_that_holds_itself_or_is_too_deep_is_refused():
    ring: list[object] = []
    ring.append(ring)
    with pytest.raises(CheckpointError, match="too deeply"):
        split(ring)
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(CheckpointError, match="too deeply"):
        split(deep)
    with pytest.raises(CheckpointError, match="too deeply"):
        join(deep, {})


def test_a_long_list_of_numbers_is_refused():
    with pytest.raises(CheckpointError, match="in a tensor"):
        split({"history": [0.5] * 500_001})


MEMORY = torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "skeleton",
    [
        {},
        {"pickle": "x"},
        {"tensor": "missing"},
        {"tensor": "m", "stride": [2**40]},
        {"tensor": "m", "stride": ["1"]},
        {"view": "m", "dtype": "float32", "shape": [3], "stride": [1], "offset": 0},
        {"view": "m", "dtype": "float32", "shape": [2], "stride": [1], "offset": -1},
        {"view": "m", "dtype": "float32", "shape": [2**62, 2**62], "stride": [2**62, 1], "offset": 0},
        {"view": "m", "dtype": "ones", "shape": [1], "stride": [1], "offset": 0},
        {"view": "m", "dtype": "__loader__", "shape": [1], "stride": [1], "offset": 0},
        {"int": "0x" + "f" * 10_000},
        {"int": 5},
        {"float": "1e999999"},
        {"bytes": "no base64!"},
        {"text": "zz"},
        {"tuple": {"dict": {}}},
        {"pairs": [[{"tuple": []}, 1]]},
        {"dict": [1]},
    ],
)
def test_hostile_skeletons_are_refused(skeleton):
    with pytest.raises(CheckpointError):
        join([skeleton], {"m": MEMORY})
