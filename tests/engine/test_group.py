"""A group of one costs nothing, and the variables of a launcher are checked."""

from __future__ import annotations

import copy

import pytest
import torch
from ranked import adamw, build, train

from upshift.engine.group import Group
from upshift.engine.plainstate import load_model_state, load_optimizer_state, model_state, optimizer_state
from upshift.engine.preflight import Ready, preflight
from upshift.engine.wrapping import blocks
from upshift.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def env(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_one_process_is_a_group(env):
    group = Group.here(device="cpu")
    values = [1.0, 2.0]
    assert (group.rank, group.world, group.main, str(group.device)) == (0, 1, True, "cpu")
    assert group.agree(values) is values and group.gather({"a": 1}) == [{"a": 1}] and group.broadcast(3) == 3
    assert not torch.distributed.is_initialized()
    model = build()
    assert group.wrap(model) is model and group.unwrap(model) is model
    assert preflight(group) == Ready(1, 0, 0.0)
    with pytest.raises(UsageError, match="ddp or fsdp2"):
        group.wrap(model, "horovod")
    group.close()


def test_torchrun_with_one_process_is_one_process(env):
    for name, value in zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
        env.setenv(name, value)
    assert Group.here(device="cpu").world == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 2"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK is 'x'"),
    ],
)
def test_variables_that_do_not_fit(env, values, message):
    for name, value in values.items():
        env.setenv(name, value)
    with pytest.raises(UsageError, match=message) as caught:
        Group.here(device="cpu")
    assert caught.value.remedy


def test_states_go_round_and_reading_them_changes_nothing():
    group = Group(torch.device("cpu"))
    model = build()
    optimizer = adamw([{"params": model.blocks.parameters()}, {"params": model.head.parameters(), "lr": 0.1}])
    assert optimizer_state(model, optimizer)["state"] == {}
    train(group, model, model, optimizer, 2)
    weights, state = model_state(model), optimizer_state(model, optimizer)
    assert weights.keys() == model.state_dict().keys()
    assert state["param_groups"][1]["params"] == ["head.weight", "head.bias"]
    assert state["state"]["head.bias"]["step"] == 2
    other = build()
    again = adamw([{"params": other.blocks.parameters()}, {"params": other.head.parameters()}])
    load_model_state(other, {key: value.clone() for key, value in weights.items()})
    load_optimizer_state(other, again, copy.deepcopy(state))
    assert again.param_groups[1]["lr"] == 0.1 and isinstance(again.param_groups[0]["betas"], tuple)
    assert train(group, other, other, again, 2, first=2) == train(group, model, model, optimizer, 2, first=2)
    with pytest.raises(UsageError, match="other parameters"):
        load_optimizer_state(other, adamw(other.parameters()), state)
    with pytest.raises(UsageError, match=r"missing: never, blocks.0.norm.weight, .*and 11 more"):
        load_model_state(other, {"head.bias": weights["head.bias"], "seen": weights["seen"]})
    with pytest.raises(UsageError, match=r"head.bias is \[2\], should be \[1\]"):
        load_model_state(other, {**weights, "head.bias": torch.ones(2)})


def test_blocks_are_the_repeated_ones_unless_weights_are_shared():
    model = build()
    assert blocks(model) == list(model.blocks)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert blocks(model) == []
    assert blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))) == []
