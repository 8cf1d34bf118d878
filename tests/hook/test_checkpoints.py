"""What reaches a checkpoint: the script's own order in memory, whatever lies behind it while training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from watched import watched

from upshift.techniques import registry

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def make(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3), torch.nn.Flatten(), torch.nn.Linear(96, 2)
    )
    return model, torch.optim.Adam(model.parameters(), lr=0.01, **options)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


@pytest.fixture
def planned():
    """A training under `channels_last`, after some steps."""
    with watched(techniques=[(registry.get("channels_last"), {"volumes": False})]):
        model, optimizer = make()
        train(model, optimizer)
        assert not model[0].weight.is_contiguous()
        yield model, optimizer


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in tensors(item)]


def test_files_have_the_scripts_order_and_the_training_keeps_its_own(planned, tmp_path: Path) -> None:
    model, optimizer = planned
    average = copy.deepcopy(model.state_dict())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "more": [average, (model[0].weight,)]}
    torch.save(state, tmp_path / "state.pt")
    safetensors.torch.save_file(model.state_dict(), str(tmp_path / "state.safetensors"))
    assert not model[0].weight.is_contiguous()
    assert not state["model"]["0.weight"].is_contiguous()

    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in tensors(found))
    assert len(tensors(found)) == len(tensors(state))
    for old, new in zip(tensors(state), tensors(found), strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype and type(old) is type(new)
    assert type(found["model"]) is OrderedDict and found["model"]._metadata == state["model"]._metadata
    assert isinstance(found["more"][1][0], torch.nn.Parameter) and found["more"][1][0].requires_grad
    # One weight, saved twice, is one weight in the file.
    assert found["model"]["0.weight"].data_ptr() == found["more"][1][0].data_ptr()
    for name, value in safetensors.torch.load_file(tmp_path / "state.safetensors").items():
        assert torch.equal(value, state["model"][name])


def test_a_fused_optimizer_that_resumes_without_upshift_is_not_misled(planned, tmp_path: Path) -> None:
    """Fused kernels ignore strides: state in another order than its parameter is applied to the wrong elements."""
    model, optimizer = planned
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again, fused = make(fused=True)
    again.load_state_dict(state["model"])
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    fused.load_state_dict(state["optimizer"])
    train(again, fused)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_tensors_the_script_put_in_this_order_itself_stay_so(planned, tmp_path: Path) -> None:
    image = torch.rand(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    torch.save({"image": image, "loop": (loop := [])}, tmp_path / "own.pt")
    loop.append(loop)
    torch.save(loop, tmp_path / "loop.pt")
    found = torch.load(tmp_path / "own.pt", weights_only=True)["image"]
    assert found.stride() == image.stride() and torch.equal(found, image)
