"""Weights of others: .pt, .safetensors and DCP folders, read and written with plain torch keys."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from upshift.checkpoint.foreign import load_weights, save_weights
from upshift.errors import CheckpointError


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))
    model[2].weight.data = model[2].weight.data.to(torch.bfloat16)
    return model


def fits(model, weights):
    wanted = model.state_dict()
    assert set(weights) == set(wanted)
    assert all(torch.equal(weights[key], wanted[key]) and weights[key].dtype == wanted[key].dtype for key in wanted)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "folder"])
def test_written_and_read(tmp_path, model, name):
    save_weights(tmp_path / name, model.state_dict())
    fits(model, load_weights(tmp_path / name))
    assert os.listdir(tmp_path) == [name]
    if "." in name:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_what_is_written_is_read_by_the_formats_own_readers(tmp_path, model):
    save_weights(tmp_path / "w.safetensors", model.state_dict())
    fits(model, load_file(tmp_path / "w.safetensors"))
    save_weights(tmp_path / "w.pt", model.state_dict())
    model.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    save_weights(tmp_path / "w", model.state_dict())
    empty = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.distributed.checkpoint.load(empty, checkpoint_id=tmp_path / "w", no_dist=True)
    fits(model, empty)


def test_files_of_others_are_read(tmp_path, model):
    optimizer = torch.optim.AdamW(model.parameters())
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "lr": 0.1, "name": "x"}
    torch.save(whole, tmp_path / "whole.ckpt")
    fits(model, load_weights(tmp_path / "whole.ckpt", key="model"))
    torch.save(dict(model.named_parameters()), tmp_path / "parameters.pt")
    assert set(load_weights(tmp_path / "parameters.pt")) == set(dict(model.named_parameters()))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "a.safetensors", {"format": "pt"})
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    fits(model, load_weights(tmp_path / "link.safetensors"))
    torch.distributed.checkpoint.save(
        {"model": model.state_dict(), "step": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    fits(model, load_weights(tmp_path / "dcp", key="model"))


@pytest.mark.parametrize(
    "tree",
    [
        {"x": torch.zeros(1).expand(10, 10)},
        {"x": torch.arange(100)[10:20:3], "y": torch.arange(6).view(2, 3).T},
        {"x": torch.zeros(0, 3), "y": torch.tensor(1.5), "z": torch.ones(2, dtype=torch.complex64)},
        {"x": torch.nn.Parameter(torch.ones(2)), "y": torch.tensor([True, False])},
        {"x": torch.ones(2, dtype=torch.float8_e4m3fn)},
    ],
)
def test_every_kind_of_plain_tensor_passes_the_look_through(tmp_path, tree):
    torch.save(tree, tmp_path / "a.pt")
    found = load_weights(tmp_path / "a.pt")
    assert all(found[key].dtype == tree[key].dtype and found[key].shape == tree[key].shape for key in tree)
    assert all(torch.equal(found[key].float(), tree[key].float()) for key in tree if not tree[key].is_complex())


def test_tied_weights(tmp_path):
    weight = torch.ones(3)
    for name in ("w.pt", "w.safetensors"):
        save_weights(tmp_path / name, {"in": weight, "out": weight})
        assert torch.equal(load_weights(tmp_path / name)["out"], weight)
    tied = load_weights(tmp_path / "w.pt")
    assert tied["in"].data_ptr() == tied["out"].data_ptr()


def test_a_file_with_more_than_weights_names_its_entries(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}, "epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        load_weights(tmp_path / "a.pt")
    assert "model, ema" in caught.value.remedy


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "empty.pt", "empty.safetensors", "emptyfolder"])
def test_what_is_no_weights_is_said(tmp_path, name):
    if name.startswith("empty"):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=name) as caught:
        load_weights(tmp_path / name)
    assert caught.value.remedy


def test_dcp_damage_is_noticed(tmp_path):
    for number, harm in enumerate((
        lambda folder: next(folder.glob("*.distcp")).unlink(),
        lambda folder: os.truncate(next(folder.glob("*.distcp")), 700),
        lambda folder: os.truncate(folder / ".metadata", 60),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        save_weights(folder, {"w": torch.arange(200.0)})
        harm(folder)
        with pytest.raises(CheckpointError):
            load_weights(folder)


def test_writing_where_one_cannot(tmp_path):
    with pytest.raises(CheckpointError, match="unknown suffix"):
        save_weights(tmp_path / "w.onnx", {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(tmp_path / "missing" / "w.pt", {"w": torch.ones(1)})
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        save_weights(tmp_path / "taken", {"w": torch.ones(1)})
