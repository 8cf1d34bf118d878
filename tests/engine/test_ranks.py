"""Two and four ranks against one process: gradients, states, memory that runs out, and what they tell each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranked
import torch
from ranked import BATCH, adamw, build, gathered, numbers, train

from upshift.engine.group import Group
from upshift.engine.plainstate import load_model_state, load_optimizer_state, model_state, optimizer_state

STEPS = 5


def alone(steps: int = STEPS, micro: int = BATCH) -> tuple[list[float], Any, Any]:
    """Losses, model and optimizer state of one process, by plain torch on the whole batch."""
    group = Group(torch.device("cpu"))
    model = build()
    optimizer = adamw(model.parameters())
    losses = train(group, model, group.wrap(model), optimizer, steps, micro=micro)
    return losses, numbers(model_state(model)), numbers(optimizer_state(model, optimizer))


def same(found: Any, expected: Any, path: str = "") -> None:
    """Equal trees, numbers to 1e-10."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, f"{path}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12), path
    else:
        assert found == expected, path


def _train(cases: list[tuple[str, int]]) -> Any:
    with Group.here(device="cpu") as group:
        return [_trained(group, kind, micro) for kind, micro in cases]


def _trained(group: Any, kind: str, micro: int) -> Any:
    model = build()
    if group.rank:
        # Wrapping gives everybody the weights of rank 0.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    model.seen.fill_(group.rank)
    module = group.wrap(model, kind)
    optimizer = adamw(model.parameters())
    losses = train(group, model, module, optimizer, STEPS, micro=micro)
    with torch.no_grad():
        module(torch.ones(1, ranked.WIDTH, dtype=torch.float64))
    weights = numbers(gathered(model_state(module)))
    own = numbers(model.state_dict()) if kind == "ddp" else None
    return {"losses": losses, "weights": weights, "own": own,
            "optimizer": numbers(gathered(optimizer_state(module, optimizer)))}  # fmt: skip


@pytest.mark.parametrize(("world", "cases"), [(2, [("ddp", 12), ("ddp", 5), ("fsdp2", 6)]), (4, [("fsdp2", 6)])])
def test_ranks_train_as_one_process_does(tmp_path, world, cases):
    losses, weights, optimizer = alone()
    first, *others = ranked.run(world, _train, cases, folder=tmp_path)
    for number in range(len(cases)):
        found = first[number]
        same(found["losses"], losses)
        same(found["weights"], weights)
        same(found["optimizer"], optimizer)
        for other in others:
            assert other[number]["losses"] == found["losses"]
            assert other[number]["weights"] == found["weights"] and other[number]["optimizer"] == found["optimizer"]
            assert other[number]["own"] == found["own"]


def _stop_and_go_on(kind: str, path: str, first: int) -> Any:
    """Two steps from what is at `path` (or from the start), the state written there again, by whatever ranks."""
    with Group.here(device="cpu") as group:
        model = build()
        module = group.wrap(model, kind)
        optimizer = adamw(model.parameters())
        if first:
            found = torch.load(path, weights_only=True)
            load_model_state(module, found["model"])
            load_optimizer_state(module, optimizer, found["optimizer"])
        train(group, model, module, optimizer, 2, first=first, micro=6)
        state = gathered({"model": model_state(module), "optimizer": optimizer_state(module, optimizer)})
        if group.main:
            torch.save(state, path)
        group.barrier()
        return None


def test_a_checkpoint_of_any_number_of_ranks_loads_in_any_other(tmp_path):
    path = str(tmp_path / "state.pt")
    for first, (world, kind) in enumerate([(4, "fsdp2"), (2, "ddp"), (2, "fsdp2"), (1, "ddp")]):
        if world == 1:
            _stop_and_go_on(kind, path, 2 * first)
        else:
            ranked.run(world, _stop_and_go_on, kind, path, 2 * first, folder=tmp_path)
    _, weights, optimizer = alone(8)
    found = torch.load(path, weights_only=True)
    same(numbers(found["model"]), weights)
    same(numbers(found["optimizer"]), optimizer)
    build().load_state_dict(found["model"])


#: (step, micro-batch) at which memory runs out once, by rank: first on one rank only, in the middle of a step.
FULL = {0: {(3, 0)}, 1: {(1, 1), (3, 0)}}


def _out_of_memory() -> Any:
    raised: list[int] = []
    with Group.here(device="cpu") as group:

        def trouble(step: int, part: int) -> None:
            if (step, part) in FULL[group.rank] and step not in raised:
                raised.append(step)
                raise torch.OutOfMemoryError("out of memory")

        model = build()
        module = group.wrap(model, "ddp")
        optimizer = adamw(model.parameters())
        losses = train(group, model, module, optimizer, STEPS, micro=6, trouble=trouble)
        return [raised, losses, numbers(model_state(module)), numbers(optimizer_state(module, optimizer))]


def test_out_of_memory_on_one_rank_repeats_the_step_on_all(tmp_path):
    """Row 15: same global batch by smaller micro-batches, and no step is made twice."""
    losses, weights, optimizer = alone()
    first, second = ranked.run(2, _out_of_memory, folder=tmp_path)
    assert (first[0], second[0]) == ([3], [1, 3])
    same(first[1], losses)
    same(first[2], weights)
    same(first[3], optimizer)
    assert second[1] == first[1]


class _Uneven(torch.nn.Module):
    """Which parameters get a gradient depends on the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.none = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
        self.low = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, x: Any, rank: int) -> Any:
        out = self.norm(x) @ self.both + self.low.float().sum()
        return out + (x @ self.one if rank == 1 else 0.0)


def _talk() -> Any:
    with Group.here(device="cpu") as group:
        found: dict[str, Any] = {}
        found["sum"] = group.agree([1.0 + group.rank, math.inf if group.rank else 0.0, 0.0])
        found["nan"] = group.sum([math.nan if group.rank else 1.0, 2.0])
        found["gather"] = group.gather({"rank": group.rank, "text": "ä" * group.rank})
        found["broadcast"] = group.broadcast([group.rank, None, "ö"])
        model = _Uneven()
        module = group.wrap(model, "ddp")
        found["unwrapped"] = module is not model and group.unwrap(torch.compile(module, backend="eager")) is model
        with group.no_sync(last=True):
            module(torch.ones(3, 2) * torch.arange(3).unsqueeze(1) * (group.rank + 1), group.rank).mean().backward()
        group.reduce_gradients(model.parameters())
        found["grads"] = numbers({name: p.grad for name, p in model.named_parameters()})
        found["running"] = model.norm.running_mean.tolist()
        sparse = torch.nn.Embedding(3, 2, sparse=True)
        sparse(torch.tensor([1])).sum().backward()
        try:
            group.reduce_gradients(sparse.parameters())
        except Exception as error:
            found["sparse"] = str(error)
        try:
            load_model_state(module, {"other": torch.ones(2)})
        except Exception as error:
            found["state"] = str(error)
        return found


def test_ranks_agree_and_average(tmp_path):
    first, second = ranked.run(2, _talk, folder=tmp_path)
    assert first["sum"] == second["sum"] == [3.0, math.inf, 0.0]
    assert math.isnan(first["nan"][0]) and first["nan"][1] == 4.0
    assert first["gather"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ä"}] and second["gather"] is None
    assert first["broadcast"] == second["broadcast"] == [0, None, "ö"]
    assert first["unwrapped"]
    # A gradient that one rank lacks counts as zero there; one that all lack stays away (weight decay would act on it).
    assert first["grads"] == second["grads"]
    assert first["grads"]["one"] == [1.0, 1.0] and first["grads"]["none"] is None
    assert first["grads"]["low"] == [1.0] * 4
    # Buffers are rank 0's: a tenth of its mean, not of rank 1's.
    assert first["running"] == second["running"] == pytest.approx([0.1, 0.1])
    assert "sparse=False" in first["sparse"] and "sparse=False" in second["sparse"]
    assert first["state"] == second["state"] and "not in the model: other" in first["state"]


def _overlapped() -> Any:
    with Group.here(device="cpu") as group:
        torch.manual_seed(5)
        model = torch.nn.Linear(3, 2).double()
        module = group.wrap(model, "ddp")
        # What CUDA does after the first steps: torch's reducer works during the last backward pass.
        group._overlaps = True
        found = []
        for step in range(2):
            rows = torch.arange(8, dtype=torch.float64).view(8, 1) * torch.ones(3) + step
            parts = rows.chunk(2)[group.rank].split(2)
            for number, part in enumerate(parts):
                with group.no_sync(last=number == 1):
                    (module(part).square().mean() / 2).backward()
            before = model.weight.grad.clone()
            group.reduce_gradients(model.parameters())
            found.append([model.weight.grad.tolist(), bool((before == model.weight.grad).all())])
            model.zero_grad(set_to_none=True)
        return found


def test_torch_s_own_reducer_gives_the_same_gradient(tmp_path):
    torch.manual_seed(5)
    model = torch.nn.Linear(3, 2).double()
    first, second = ranked.run(2, _overlapped, folder=tmp_path)
    assert first == second
    for step, (gradient, untouched) in enumerate(first):
        rows = torch.arange(8, dtype=torch.float64).view(8, 1) * torch.ones(3) + step
        model.zero_grad()
        model(rows).square().mean().backward()
        same(gradient, model.weight.grad.tolist())
        assert untouched
